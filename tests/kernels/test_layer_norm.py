"""`kernels/layer_norm.py` against its definitions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.layer_norm")


@pytest.mark.parametrize("parameters", ["weight, bias", "weight", "none"])
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
def test_add_layer_norm(
    shape: tuple[int, ...],
    parameters: str,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, *shape, device=device) * 3 + 1).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype) if "weight" in parameters else None
    bias = torch.randn(shape[-1], device=device).to(dtype) if "bias" in parameters else None
    before = x.clone(), residual.clone()
    normalised, total = kernel.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert normalised.is_contiguous()
    assert_same(normalised, eager.add_layer_norm(x, residual, weight, bias, 1e-5)[0])
    assert torch.equal(total, x + residual), "rounded once, as the sum in torch"
    normalised, total = kernel.add_layer_norm(x, None, weight, bias, 1e-5)
    assert total is x
    assert_same(normalised, eager.add_layer_norm(x, None, weight, bias, 1e-5)[0])
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_columns_of_a_wider_product(
    dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    product = torch.randn(5, 7, 50, device=device).to(dtype)
    x, residual = product[:, 2:5, 7:40], product[:, 1:4, 1:34]
    weight, bias = torch.randn(2, 33, device=device).to(dtype)
    ours = kernel.add_layer_norm(x, residual, weight, bias, 1e-5)
    for tensor, definition in zip(ours, eager.add_layer_norm(x, residual, weight, bias, 1e-5), strict=True):
        assert_same(tensor, definition)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 8),
        (1, 1, 1),
        (5, 3, 20),  # several heads to a program
        (3, 70, 64),
        (2, 2, 16385),
        pytest.param((4096, 64, 128), marks=pytest.mark.cuda),
    ],
    ids=str,
)
def test_head_layer_norm(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    num_tokens, heads, head_dim = shape
    product = (torch.randn(num_tokens, heads + 3, head_dim, device=device) * 3 + 1).to(dtype)
    weight = torch.randn(heads, head_dim, device=device).to(dtype)
    before = product.clone()
    for x in (product[:, 2:-1], product[:, 3:].contiguous()):
        ours = kernel.head_layer_norm(x, weight, 1e-5)
        assert ours.is_contiguous()
        assert_same(ours, eager.head_layer_norm(x, weight, 1e-5))
    assert torch.equal(product, before)


def test_a_row_far_from_zero_keeps_its_variance(device: torch.device) -> None:
    """Mean of squares less square of the mean would have lost it."""
    x = torch.tensor([[4096.0, 4097.0] * 16], device=device)
    ours, _ = kernel.add_layer_norm(x, None, None, None, 0.0)
    torch.testing.assert_close(ours, torch.tensor([[-1.0, 1.0] * 16], device=device))
