"""What keeps layers from being divided: modules that ours cannot take the place of, and what stands between those.

What stands between the linear layers of an MLP is tried: it must do the same to a part as to the whole.
A rank has a part of the intermediate dim. An activation takes each element by itself; a norm, or a cutoff at a
quantile, would take its own part for the whole.
"""

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...policies.generic import STYLES, Style
from .trace import is_kept_wide, naming

_NUM_TOKENS = 3
_SMALL = 4096  # elements of the intermediate dim that are tried at most


class _Gives(nn.Module):
    """In the place of a linear layer whose output is divided."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out


class _Takes(nn.Module):
    """In the place of a linear layer whose input is divided: keeps the input."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features, self.taken = out_features, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.taken = x
        return x.new_zeros(*x.shape[:-1], self.out_features)


def why_undivided(model: nn.Module, prefix: str, styles: Mapping[str, str], traced: Collection[str]) -> str | None:
    """What keeps the model from being divided over tp; None if nothing does.

    prefix: of the decoder layers; traced: attention modules, of which `trace.py` sees what they compute.
    """
    for name, module in model.named_modules():
        if name in styles and STYLES[styles[name]].is_split:
            if type(module) is not nn.Linear:
                return f"its table divides {name}, which is a {type(module).__name__}"
            if is_kept_wide(model, f"{name}.weight", torch.float16):
                return f"{name} is kept in float32"
    for name, module, linears in _between(model, prefix, styles):
        if name in traced:
            continue
        with naming(f"a trial of {name}"):
            if not _is_alike(module, linears):
                return f"{name} computes on all of its intermediate dim together"
    return None


def _between(
    model: nn.Module, prefix: str, styles: Mapping[str, str]
) -> Iterator[tuple[str, nn.Module, dict[str, Style]]]:
    """Modules that have both kinds of linear layers: (name, module, style of each of these)."""
    for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
        found = {
            own: STYLES[styles[f"{name}.{own}"]]
            for own, child in module.named_children()
            if isinstance(child, nn.Linear) and f"{name}.{own}" in styles
        }
        outs = [style for style in found.values() if style.splits_output and not style.is_gathered]
        ins = [style for style in found.values() if style.splits_input and not style.takes_whole]
        if outs and ins and not any(True for _ in module.parameters(recurse=False)) and _is_plain(module, found):
            yield name, module, found


def _is_plain(module: nn.Module, linears: Mapping[str, Style]) -> bool:
    """Whether nothing but these layers and functions is in it."""
    others = (child for own, child in module.named_children() if own not in linears)
    return not any(list(child.parameters()) or isinstance(child, nn.ModuleList) for child in others)


def _is_alike(module: nn.Module, linears: Mapping[str, Style]) -> bool:
    """Whether halves of the outputs give halves of the inputs."""
    random = torch.Generator().manual_seed(0)
    ways, taken = {}, []
    width = 0
    for own, style in linears.items():
        child: Any = getattr(module, own)
        if style.splits_output:
            size = min(child.out_features // style.parts, _SMALL)
            ways[own] = torch.randn(style.parts, 1, _NUM_TOKENS, size, generator=random)
        width = width or child.in_features
    size = next(iter(ways.values())).shape[-1]
    x = torch.randn(1, _NUM_TOKENS, width, generator=random)
    for part in (slice(None), slice(0, size // 3), slice(size // 3, None)):
        trial = copy(module)
        trial._modules = dict(module._modules)
        for own in linears:
            child = getattr(module, own)
            trial._modules[own] = (
                _Gives(torch.cat(list(ways[own][..., part]), dim=-1)) if own in ways else _Takes(child.out_features)
            )
        with torch.no_grad():
            trial(x)
        taken.append([module.taken for module in trial.children() if isinstance(module, _Takes)])
    whole, *parts = taken
    return all(
        torch.allclose(torch.cat(halves, dim=-1), all_of_it, rtol=1e-4, atol=1e-5)
        for all_of_it, *halves in zip(whole, *parts, strict=True)
    )
