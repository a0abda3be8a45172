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
    """A step in which each token attends to itself alone."""

    received: Tensor | None  # see `Step`

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous()


@torch.inference_mode()
def prove_apart(stage: "GenericStage", longest: int) -> None:
    """Proves that tokens meet in attention only, and have the positions that they are given: without attention, each
    keeps its hidden states when they change places and others join. Raises ValueError.

    Most tokens must: a rounding error may make a router send one elsewhere.
    """
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(longest, (16,), generator=random)
    if stage.is_first:
        tokens = torch.randint(stage.spec.vocab_size, (16,), generator=random)
    else:
        tokens = torch.randn(16, stage.spec.hidden_size, generator=random).to(stage.dtype)
    first = torch.arange(12)
    second = 4 + torch.randperm(12, generator=random)  # 4 to 11 are in both
    results = [
        stage.run(tokens[rows].to(stage.device), positions[rows].to(stage.device), _Apart).float()
        for rows in (first, second)
    ]
    expected = results[0][4:]
    found = results[1][[int((second == row).nonzero()) for row in range(4, 12)]]
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    if not error < _TOLERANCE.get(stage.dtype, 5e-2):
        raise ValueError(
            f"architecture {stage.spec.architecture} is not supported: its layers mix tokens outside attention, or "
            f"count positions by themselves (hidden states change by {error:.1%} when tokens change places)"
        )
