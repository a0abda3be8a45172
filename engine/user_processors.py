"""Users' logits processors: called one row at a time, and what they return is looked at before it is used."""

import traceback
from typing import Any

import torch
from torch import Tensor

from .logits_spec import LogitsSpec


class Refused(Exception):
    """Why a processor's logits cannot be used, in one line."""


def process(spec: LogitsSpec, token_ids: list[int], logits: Tensor) -> Tensor:
    """What a spec's processors, one after the other, make of a row, float32 [vocab], which stays as it is.

    token_ids: those before, the prompt's first. Raises Refused.
    """
    for place, processor in enumerate(spec.processors):
        prompt, output = token_ids[: spec.num_prompt_tokens], token_ids[spec.num_prompt_tokens :]
        try:
            logits = _usable(processor(prompt, output, logits.clone()), logits)
        except (Exception, SystemExit) as error:  # of a tensor that cannot be looked at, too
            reason = str(error) if isinstance(error, Refused) else f"raised {_one_line(error)}"
            raise Refused(f"SamplingParams.logits_processors[{place}] {reason}") from error
    return logits


def _usable(result: Any, logits: Tensor) -> Tensor:
    """What a processor has made of logits, as they are. Raises Refused."""
    if not isinstance(result, Tensor):
        raise Refused(f"returned {type(result).__name__}: it must return the logits, a tensor")
    if result.shape != logits.shape:
        raise Refused(f"returned a tensor {list(result.shape)}: it must be {list(logits.shape)}")
    if result.is_complex() or not (result > -torch.inf).any() or result.isnan().any():
        raise Refused("returned logits that are NaN, or -inf throughout: no token can be drawn from them")
    return result.detach().to(logits)


def _one_line(error: BaseException) -> str:
    """Also of an exception that cannot tell of itself."""
    return " ".join("".join(traceback.format_exception_only(error)).split())
