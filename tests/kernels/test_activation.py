"""`kernels/activation.py` against its definitions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.activation")

OPS = [
    *((eager.activation, kernel.activation, kind) for kind in eager.KINDS if kind != "swiglu_oai"),
    *((eager.gated_activation, kernel.gated_activation, kind) for kind in eager.KINDS),
]
OP = pytest.mark.parametrize(("eager_op", "op", "kind"), OPS, ids=[f"{op.__name__} {kind}" for op, _, kind in OPS])
Op = Callable[[str], eager.Activation]


@OP
@pytest.mark.parametrize(
    "shape",
    [
        (0, 4),
        (1, 1),
        (7, 69),
        (2, 1025),  # more than a block
        pytest.param((4096, 14336), marks=pytest.mark.cuda),
    ],
    ids=str,
)
def test_activations(
    shape: tuple[int, int],
    eager_op: Op,
    op: Op,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    ours, definition = op(kind), eager_op(kind)
    wider = (torch.randn(shape[0], 2 * shape[1] + 3, device=device) * 4).to(dtype)
    before = wider.clone()
    for gate_up in (wider[:, : 2 * shape[1]].contiguous(), wider[:, 2:-1]):
        assert_same(ours(gate_up), definition(gate_up))
    assert torch.equal(wider, before)


@OP
def test_far_from_zero(
    eager_op: Op, op: Op, kind: str, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    """Where exp overflows or vanishes, and past the limits of what is limited."""
    gate = torch.tensor([-3e4, -200.0, -90.0, -20.0, -6.0, -0.0, 0.0, 1e-30, 20.0, 90.0, 200.0, 3e4], device=device)
    for up in (torch.ones_like(gate), gate.flip(0)):
        for gate_up in (torch.cat((gate, up)).unsqueeze(0), torch.stack((gate, up), dim=1).view(1, -1)):
            assert_same(op(kind)(gate_up), eager_op(kind)(gate_up))
