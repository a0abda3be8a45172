"""How transformers' own layers reach our attention and experts: by the interfaces that transformers offers for it.

A layer hands the keyword arguments of the model's forward on to its attention; one of them, `step`, answers.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NAME = "meshlm"  # in a config: no masks are made
TRACED = "meshlm_traced"  # masks are functions that can be asked, experts compute nothing


class Step(Protocol):
    """What a forward knows of its tokens."""

    @property
    def received(self) -> Tensor | None:
        """[1, num_tokens, hidden] from the stage before; None on the first."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        """query: [1, heads, num_tokens, head_dim], key, value with their own heads -> [1, num_tokens, heads, value_dim]

        module: the one that calls; asked: all that it says of how to attend.
        """


class NotHandedOn(Exception):
    """A layer that does not give its attention the keyword arguments that it gets: it must be told beforehand."""


@dataclass(frozen=True)
class Mask:
    """Stands in a trace for the mask of a layer's attention."""

    visible: Any  # (batch, head, query position, key position), tensors -> whether the query sees the key


def register() -> None:
    """Makes our attention and experts known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (NAME, TRACED):
        ALL_ATTENTION_FUNCTIONS.register(name, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED, lambda mask_function, **_: Mask(mask_function))
    ALL_EXPERTS_FUNCTIONS.register(NAME, _compute_experts)
    ALL_EXPERTS_FUNCTIONS.register(TRACED, lambda module, hidden, index, weights: torch.empty_like(hidden))


def tell(attention: nn.Module, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a layer runs that does not hand the step on (a forward pre-hook): its attention gets it."""
    attention.step = kwargs["step"]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    *,
    step: Step | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    if step is None:
        step = getattr(module, "step", None)
    if step is None:
        raise NotHandedOn(type(module).__name__)
    return step.attend(module, query, key, value, attention_mask, asked), None


def _compute_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    out: Tensor = module.experts(hidden, index, weights)
    return out
