"""The bound forms of a linear layer against its plain definition."""

import pytest
import torch
import torch.nn.functional as F

from meshlm.kernels import linear, select_ops

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 64, 48), (3, 7, 5), (17, 130, 33), (4, 576, 960)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_bound_form_is_the_product(dtype: torch.dtype, shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    rows, size_in, size_out = shape
    x, weight = torch.randn(rows, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
    added = torch.randn(size_out).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
    forms = [linear.bind_plain] + ([linear.bind_packed] if linear.why_plain(CPU, dtype) is None else [])
    for bind in forms:
        out = bind(weight)(x, added)
        assert out.dtype == dtype and out.shape == (rows, size_out)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype] * size_in**0.5
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(linear.why_plain(CPU, torch.float32) is not None, reason="needs oneDNN")
def test_a_packed_weight_is_a_copy_that_stays() -> None:
    weight, x = torch.randn(6, 9), torch.randn(2, 9)
    product, expected = linear.bind_packed(weight), F.linear(x, weight)
    weight.zero_()
    torch.testing.assert_close(product(x, None), expected)
    assert product(x[:0], None).shape == (0, 6)


def test_without_onednn_the_plain_form_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    ops = select_ops(CPU, torch.float32)
    assert "packed" not in ops.name and ops.bind_linear is linear.bind_plain


def test_an_accelerator_has_no_packed_form() -> None:
    assert linear.why_plain(torch.device("cuda"), torch.float32)
