"""The bound forms of a linear layer against its plain definition."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from meshlm.kernels import eager, linear, select_ops
from meshlm.kernels.cpu import CpuLinear, Unavailable

CPU = torch.device("cpu")


def streamed(dtype: torch.dtype) -> list[Callable[[torch.Tensor], linear.Linear]]:
    """The forms in which our own op takes over few rows; all of them here."""
    try:
        ours = CpuLinear(dtype)
    except Unavailable:
        return []
    bound: list[Callable[[torch.Tensor], linear.Linear]] = [
        lambda weight: linear.bind_packed(weight, ours=ours)[0],
        partial(linear.bind_shared, ours=ours),
        partial(linear.bind, ours=ours),
    ]
    return bound


def streamed_or_skip(dtype: torch.dtype) -> list[Callable[[torch.Tensor], linear.Linear]]:
    """The same, where oneDNN is there for the other rows."""
    if (reason := linear.why_plain(CPU, dtype)) is not None:
        pytest.skip(reason)
    return streamed(dtype) or pytest.skip("needs a compiler")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64, 48), (3, 7, 5), (17, 130, 33), (4, 576, 960), (6, 1100, 130)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bound_form_is_the_product(dtype: torch.dtype, shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    rows, size_in, size_out = shape
    x, weight = torch.randn(rows, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
    added = torch.randn(size_out).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    forms = [linear.bind_plain]
    if linear.why_plain(CPU, dtype) is None:
        forms += [linear.bind, linear.bind_shared, *streamed(dtype)]
    for bind in forms:
        out = bind(weight)(x, added)
        assert out.dtype == dtype and out.shape == (rows, size_out)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * size_in**0.5
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_rows_is_streamed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the most that are multiplied at once, and more; on this processor oneDNN's layout must be known."""
    forms = streamed_or_skip(dtype)
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: 100)
    weight = torch.randn(200, 96).to(dtype)
    for bind in forms:
        product = bind(weight)
        for rows in (*range(1, 30), 63, 90):
            x = torch.randn(rows, 96).to(dtype)
            torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=2e-2, atol=2e-2)
        x = torch.randn(1, 3, 96).to(dtype)
        torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=2e-2, atol=2e-2)
        assert product(x[:, :0], None).shape == (1, 0, 200)


@pytest.mark.parametrize("shape", [(200, 96), (64, 48), (130, 7), (1, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tied_weight_is_looked_up_where_it_is_multiplied(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    streamed_or_skip(dtype)
    weight = torch.randn(shape).to(dtype)
    product, look_up = linear.bind_tied(weight, False, CpuLinear(dtype))
    x = torch.randn(3, shape[1]).to(dtype)
    torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=3e-2, atol=3e-2)
    assert linear.bind_tied(weight, True, CpuLinear(dtype))[1] is None
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and shape[0] >= 64:  # else the layout may be another
        assert look_up is not None
    if look_up is not None:
        token_ids = torch.tensor([5, 4, 5 + shape[0], 4 + shape[0], *torch.randint(5, 5 + shape[0], (70,)).tolist()])
        assert torch.equal(look_up(token_ids, 5), eager.embedding(token_ids, weight, 5))
        assert look_up(token_ids[:0], 5).shape == (0, shape[1])


def test_another_layout_is_not_streamed() -> None:
    streamed_or_skip(torch.float32)
    weight = torch.randn(100, 100)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    panel = CpuLinear(torch.float32).panel
    other = weight.clone()
    other[99, 99] += 1
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # else it may be another
        assert linear._address_of_panels(weight, packed, panel)
    assert linear._address_of_panels(other, packed, panel) is None
    assert linear._address_of_panels(weight, packed, (panel[0] * 2, *panel[1:])) is None


@pytest.mark.skipif(linear.why_plain(CPU, torch.float32) is not None, reason="needs oneDNN")
def test_a_packed_weight_is_a_copy_that_stays() -> None:
    weight, x = torch.randn(6, 9), torch.randn(2, 9)
    product, expected = linear.bind(weight), F.linear(x, weight)
    weight.zero_()
    torch.testing.assert_close(product(x, None), expected)
    assert product(x[:0], None).shape == (0, 6)


def test_without_onednn_the_plain_form_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    ops = select_ops(CPU, torch.float32)
    assert "packed" not in ops.name and ops.bind_linear is linear.bind_plain


def test_an_accelerator_has_no_packed_form() -> None:
    assert linear.why_plain(torch.device("cuda"), torch.float32)
