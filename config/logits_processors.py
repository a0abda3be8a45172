"""Callables of the user's that change logits, and transformers' own, brought to one signature."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LogitsProcessor = Callable[[list[int], list[int], Any], Any]
"""f(prompt_token_ids, output_token_ids, logits [vocab_size]) -> logits [vocab_size]."""


@dataclass(frozen=True)
class TransformersProcessor:
    """A `LogitsProcessor` of transformers, which takes batches: input_ids [1, length], scores [1, vocab_size]."""

    processor: Any

    def __call__(self, prompt_token_ids: list[int], output_token_ids: list[int], logits: Any) -> Any:
        import torch

        input_ids = torch.tensor([[*prompt_token_ids, *output_token_ids]], device=logits.device)
        return self.processor(input_ids, logits.unsqueeze(0)).squeeze(0)


def as_logits_processors(value: Any) -> tuple[LogitsProcessor, ...]:
    """From one processor or a list of them (transformers' LogitsProcessorList is one). Raises ValueError."""
    given = value if isinstance(value, Sequence) else [value]
    return tuple(_as_logits_processor(processor) for processor in given)


def _as_logits_processor(processor: Any) -> LogitsProcessor:
    if _is_from_transformers(processor):
        return TransformersProcessor(processor)
    if not callable(processor):
        raise ValueError(f"must hold callables, not {type(processor).__name__}")
    try:
        inspect.signature(processor).bind([], [], None)
    except TypeError:
        raise ValueError("must hold callables of (prompt_token_ids, output_token_ids, logits)") from None
    except ValueError:  # what is written in C tells no signature
        pass
    return processor


def _is_from_transformers(processor: Any) -> bool:
    return any(
        kind.__name__ == "LogitsProcessor" and kind.__module__.startswith("transformers.")
        for kind in type(processor).__mro__
    )
