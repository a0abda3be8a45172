"""`kernels/layer_norm.py` against its definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.layer_norm")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (0, 8),
        (1, 1),
        (3, 576),
        (5, 33),
        (70,),
        (17, 2, 80),
        (2, 3, 2, 5),
        (2, 16385),  # more than a block
        pytest.param((4096, 4096), marks=pytest.mark.cuda),
        pytest.param((64, 50000), marks=pytest.mark.cuda),
    ],
    ids=str,
)
def test_layer_norm(
    shape: tuple[int, ...],
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=device) * 3 + 1).to(dtype)
    weight, added = torch.randn(2, shape[-1], device=device).to(dtype)
    before = x.clone()
    ours = kernel.layer_norm(x, weight, added if bias else None, 1e-5)
    assert ours.is_contiguous()
    assert_same(ours, eager.layer_norm(x, weight, added if bias else None, 1e-5))
    assert torch.equal(x, before)


def test_columns_of_a_wider_product(
    dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 50, device=device).to(dtype)[:, 2:5, 7:40]
    weight, bias = torch.randn(2, 33, device=device).to(dtype)
    assert_same(kernel.layer_norm(x, weight, bias, 1e-5), eager.layer_norm(x, weight, bias, 1e-5))


def test_a_row_far_from_zero_keeps_its_variance(device: torch.device) -> None:
    """Mean of squares less square of the mean would have lost it."""
    x = torch.tensor([[4096.0, 4097.0] * 16], device=device)
    ours = kernel.layer_norm(x, torch.ones(32, device=device), None, 0.0)
    torch.testing.assert_close(ours, torch.tensor([[-1.0, 1.0] * 16], device=device))
