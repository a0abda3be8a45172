"""Tokens drafted ahead of the model: who drafts them on the driver, and how many pay."""

from typing import TYPE_CHECKING

from .adaptive import Acceptance, DraftLength, FixedDraftLength
from .base import Drafter
from .ngram import NGramDrafter
from .step_cost import StepCost
from .suffix import SuffixDrafter

if TYPE_CHECKING:
    from ...config import SpeculativeConfig

__all__ = [
    "Acceptance",
    "DraftLength",
    "Drafter",
    "FixedDraftLength",
    "StepCost",
    "create_draft_length",
    "create_drafter",
]


def create_drafter(config: "SpeculativeConfig") -> Drafter:
    """The drafter of a method that needs no model."""
    if config.method == "ngram":
        return NGramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
    assert config.method == "suffix", f"{config.method} does not draft on the driver"
    return SuffixDrafter(config.suffix_min_probability, config.suffix_max_cached_tokens)


def create_draft_length(config: "SpeculativeConfig", acceptance: float) -> DraftLength | FixedDraftLength:
    """For one sequence. acceptance: that is expected of its drafts."""
    return DraftLength(config.num_speculative_tokens, acceptance) if config.adaptive else FixedDraftLength()
