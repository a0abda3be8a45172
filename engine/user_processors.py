"""Users' logits processors: called one row at a time, and what they return is looked at before it is used."""

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
        name = f"SamplingParams.logits_processors[{place}]"
        prompt, output = token_ids[: spec.num_prompt_tokens], token_ids[spec.num_prompt_tokens :]
        try:
            result = processor(prompt, output, logits.clone())
        except Exception as error:
            raise Refused(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())}") from error
        if not isinstance(result, Tensor):
            raise Refused(f"{name} returned {type(result).__name__}: it must return the logits, a tensor")
        if result.shape != logits.shape:
            raise Refused(f"{name} returned a tensor {list(result.shape)}: it must be {list(logits.shape)}")
        if result.is_complex() or not (result > -torch.inf).any() or result.isnan().any():
            raise Refused(f"{name} returned logits that are NaN, or -inf throughout: no token can be drawn from them")
        logits = result.detach().to(logits)
    return logits
