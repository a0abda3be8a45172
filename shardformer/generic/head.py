"""From hidden states to logits by the family's own forward, whatever it does on the way: multipliers, soft-caps."""

from copy import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .trace import Refused, base_name, naming, parent


def head_of(model: Any, prefix: str) -> Any:
    """The model without what makes hidden states, for `run_head`; modules are shared. prefix: of the decoder layers."""
    base = base_name(model)
    return _with(model, base, _Given(parent(prefix).removeprefix(base).removeprefix(".")))


def run_head(head: Any, hidden: Tensor) -> Tensor:
    """hidden: [1, num_rows, hidden] -> logits [1, num_rows, vocabulary of its LM head]."""
    logits: Tensor = head(inputs_embeds=hidden, use_cache=False).logits
    return logits


def check_logits(model: Any, prefix: str, lm_head: str) -> None:
    """Proves that what the model does to logits, it does to each by itself: a rank has those of its vocabulary only."""
    vocab_size, hidden_size = model.config.vocab_size, model.config.hidden_size
    logits, cut = torch.linspace(-40, 40, vocab_size).view(1, 1, -1), vocab_size // 3
    hidden, head = torch.empty(1, 1, hidden_size, device="meta"), head_of(model, prefix)
    with torch.no_grad(), naming("a trial of its logits"):
        whole, part = (run_head(_with(head, lm_head, _Fixed(some)), hidden) for some in (logits, logits[..., cut:]))
        if whole.shape != logits.shape or not torch.equal(whole[..., cut:], part):
            raise Refused(f"{type(model).__name__} computes on all logits of a token together")


def _with(model: Any, name: str, module: nn.Module) -> Any:
    """The model with another in the place of a module; itself unchanged, all else shared."""
    model = copy(model)
    model._modules = dict(model._modules)
    first, _, rest = name.partition(".")
    model._modules[first] = _with(model._modules[first], rest, module) if rest else module
    return model


class _Given(nn.Module):
    """In the place of what makes hidden states: gives back what it is given. So does what it has at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        if first:
            setattr(self, first, _Given(rest))

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _output_class()(last_hidden_state=inputs_embeds)


class _Fixed(nn.Module):
    """In the place of an LM head: gives the same logits for anything."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: Tensor) -> Tensor:
        return self.logits


@cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """What makes hidden states gives more in some families; here that is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Output
