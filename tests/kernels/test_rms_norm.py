"""`kernels/rms_norm.py` against its definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.rms_norm")

SHAPES = [
    (0, 8),
    (1, 1),
    (1, 7),
    (3, 576),
    (5, 33),
    (70,),
    (0, 2, 16),
    (17, 2, 80),  # several rows to a program
    (2, 3, 2, 5),
    (2, 16385),  # more than a block
    pytest.param((4096, 4096), marks=pytest.mark.cuda),
    pytest.param((4096, 40, 128), marks=pytest.mark.cuda),
    pytest.param((64, 50000), marks=pytest.mark.cuda),
]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(
    shape: tuple[int, ...],
    offset: float,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    before = x.clone()
    ours = kernel.rms_norm(x, weight, 1e-5, offset)
    assert ours.is_contiguous()
    assert_same(ours, eager.rms_norm(x, weight, 1e-5, offset))
    assert torch.equal(x, before)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(
    shape: tuple[int, ...],
    offset: float,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, *shape, device=device) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    before = x.clone(), residual.clone()
    normalised, total = kernel.add_rms_norm(x, residual, weight, 1e-5, offset)
    assert_same(normalised, eager.add_rms_norm(x, residual, weight, 1e-5, offset)[0])
    assert torch.equal(total, x + residual), "rounded once, as the sum in torch"
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    normalised, total = kernel.add_rms_norm(x, None, weight, 1e-5, offset)
    assert total is x
    assert_same(normalised, eager.rms_norm(x, weight, 1e-5, offset))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_heads_and_columns_of_a_wider_product(
    num_tokens: int, dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    product = torch.randn(num_tokens, 11, 24, device=device).to(dtype)
    weight = torch.randn(24, device=device).to(dtype)
    heads = product[:, 6:9]
    assert_same(kernel.rms_norm(heads, weight, 1e-5), eager.rms_norm(heads, weight, 1e-5))
    columns, others = product.view(num_tokens, -1)[:, 24:48], product.view(num_tokens, -1)[:, 100:124]
    ours = kernel.add_rms_norm(columns, others, weight, 1e-5)
    for tensor, definition in zip(ours, eager.add_rms_norm(columns, others, weight, 1e-5), strict=True):
        assert_same(tensor, definition)
    heads, weight = product[:, ::2, 1:], weight[1:]
    assert_same(kernel.rms_norm(heads, weight, 1e-5), eager.rms_norm(heads, weight, 1e-5))


def test_a_large_half_does_not_overflow(device: torch.device) -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16, device=device)  # its square is no float16
    ones = torch.ones(64, dtype=torch.float16, device=device)
    assert torch.equal(kernel.rms_norm(x, ones, 1e-5), ones.view(1, -1))
