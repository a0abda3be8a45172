"""`kernels/activation.py` against its definitions."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.activation")

PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (kernel.silu_and_mul, eager.silu_and_mul),
    "gelu": (partial(kernel.gelu_and_mul, tanh=False), partial(eager.gelu_and_mul, tanh=False)),
    "gelu, tanh": (partial(kernel.gelu_and_mul, tanh=True), partial(eager.gelu_and_mul, tanh=True)),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 4),
        (1, 1),
        (3, 5),
        (7, 768),
        (2, 1025),  # more than a block
        pytest.param((4096, 14336), marks=pytest.mark.cuda),
    ],
    ids=str,
)
def test_gated_activation(
    shape: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    ours, definition = PAIRS[kind]
    wider = (torch.randn(shape[0], 2 * shape[1] + 3, device=device) * 4).to(dtype)
    before = wider.clone()
    for gate_up in (wider[:, : 2 * shape[1]].contiguous(), wider[:, 2:-1]):
        assert_same(ours(gate_up), definition(gate_up))
    assert torch.equal(wider, before)


@pytest.mark.parametrize("kind", PAIRS)
def test_far_from_zero(kind: str, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]) -> None:
    """Where exp overflows or vanishes."""
    gate = torch.tensor([-3e4, -200.0, -90.0, -20.0, -6.0, -0.0, 0.0, 1e-30, 20.0, 90.0, 200.0, 3e4], device=device)
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    ours, definition = PAIRS[kind]
    assert_same(ours(gate_up), definition(gate_up))
