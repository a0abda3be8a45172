"""What crosses from the driver to a replica's ranks and back: frozen, plain numbers."""

from array import array
from dataclasses import dataclass
from typing import Any

from .logits_spec import LogitsSpec


@dataclass(frozen=True)
class SampleRequest:
    """One row of logits to draw a token from."""

    sequence: int  # index in the step: the row is this sequence's last token
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    key: tuple[int, int]  # two int32 words for the noise, from (seed, request, position)
    banned: tuple[int, ...]  # token ids that must not be drawn (min_tokens)


@dataclass(frozen=True)
class HistoryUpdate:
    """What becomes of one slot of the last stage's histories before a step draws; see `histories.py`."""

    slot: int
    keep: int  # so many of the slot's tokens stay
    tokens: "array[int]"  # int64, behind them; below 0: see `drawn_before`
    spec: LogitsSpec | None  # of the sequence that opens the slot; None: as before


@dataclass(frozen=True)
class StepInput:
    """One forward of one replica: new tokens of some sequences, flattened, never padded."""

    step_id: int
    token_ids: "array[int]"  # int64 [num_tokens]; below 0: see `drawn_before`
    query_lens: tuple[int, ...]  # new tokens of each sequence, >= 1
    context_lens: tuple[int, ...]  # its tokens before those, in the cache already
    block_tables: tuple["array[int]", ...]  # int32: its blocks, enough for context and new tokens
    samples: tuple[SampleRequest, ...]  # in the order in which the output's ids come

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def drawn_before(sample: Any) -> Any:
    """Stands in `token_ids` for what the step before this one draws for its `sample`-th sample; its own inverse."""
    return -1 - sample


@dataclass(frozen=True)
class StepOutput:
    """What the last stage drew, one id for each of the step's samples."""

    step_id: int
    token_ids: tuple[int, ...]
