"""What is proved of a stage of foreign layers once the weights are there: that tokens meet in attention only."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .stage import GenericStage

_TOLERANCE = {torch.float32: 1e-3}  # of hidden states' norm; others: 5e-2


@dataclass(frozen=True)
class _Apart:
    """A step in which each token attends to itself alone; what comes out depends on its query and key as well."""

    received: Tensor | None  # see `Step`

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        heard = _along(query).abs().log1p() + _along(key).abs().log1p()
        return (value * heard.to(value.dtype)).transpose(1, 2).contiguous()


def _along(x: Tensor) -> Tensor:
    """Each head's part in a direction that rotation moves it out of: [..., dim] -> [..., 1]."""
    direction = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    return (x.float() @ direction).unsqueeze(-1) / x.shape[-1] ** 0.5


@torch.inference_mode()
def prove(stage: "GenericStage", longest: int) -> None:
    """Proves that tokens meet in attention only, and have the positions that they are given: without attention, each
    keeps its hidden states when they change places and others join, more than have gone and further on. On a later
    stage, that no layer hears of the embedding. Raises ValueError.

    Most tokens must: a rounding error may make a router send one elsewhere.
    """
    random = torch.Generator().manual_seed(0)
    near = torch.randint((longest + 1) // 2, (12,), generator=random)
    positions = torch.cat([near, torch.arange(longest - 8, longest).clamp(min=0)])
    if stage.is_first:
        tokens = torch.randint(stage.spec.vocab_size, (20,), generator=random)
    else:
        tokens = torch.randn(20, stage.spec.hidden_size, generator=random).to(stage.dtype)

    def run(rows: Tensor, embedding: float) -> Tensor:
        x, at = tokens[rows].to(stage.device), positions[rows].to(stage.device)
        return stage.run(x, at, _Apart, embedding).float()

    first, second = torch.arange(12), 4 + torch.randperm(16, generator=random)  # 4 to 11 are in both
    expected = run(first, 0.0)
    if not expected.isfinite().all():
        raise ValueError(
            f"{stage.spec.architecture}: a trial of its layers {stage.layer_range[0]} to {stage.layer_range[1] - 1} in "
            f"{str(stage.dtype).removeprefix('torch.')} gives NaN or infinity; look for these in its weights, or use a "
            f"wider dtype"
        )
    tolerance = _TOLERANCE.get(stage.dtype, 5e-2)
    if not stage.is_first and not _change(run(first, 1.0), expected) < tolerance:
        raise ValueError(
            f"{stage.spec.architecture} cannot be divided into stages (its layers use the embedding); use pp_size=1"
        )
    places = [int((second == row).nonzero()) for row in range(4, 12)]
    change = _change(run(second, 0.0)[places], expected[4:])
    if not change < tolerance:
        raise ValueError(
            f"architecture {stage.spec.architecture} is not supported: its layers mix tokens outside attention, or "
            f"count positions by themselves (hidden states change by {change:.1%} when tokens change places)"
        )


def _change(found: Tensor, expected: Tensor) -> float:
    """Of most tokens' hidden states, as a part of their norm."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
