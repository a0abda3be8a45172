"""Weights in 12 bits an element: nothing is lost, and products are those of the weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshlm.kernels import linear
from meshlm.kernels.cpu import CpuLinear, Unavailable


def has_bfloat16_products() -> bool:
    with open("/proc/cpuinfo") as cpuinfo:
        return "avx512_bf16" in cpuinfo.read()


@pytest.fixture(scope="module")
def ours() -> CpuLinear:
    try:
        ours = CpuLinear(torch.bfloat16)
    except Unavailable as why:
        pytest.skip(str(why))
    if ours.compact(torch.ones(64, 64, dtype=torch.bfloat16)) is None:
        assert not has_bfloat16_products()
        pytest.skip("bfloat16 is held so only with AVX512-BF16")
    return ours


def weight_of(size_out: int, size_in: int) -> Tensor:
    """As a model's, and in it every kind of number that a bfloat16 can be, finite."""
    weight = (0.05 * torch.randn(size_out, size_in)).bfloat16()
    others = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 1e-38, 3e-12, -2e9, 1e30, -3e38]).bfloat16()
    places = torch.randperm(weight.numel())[: len(others)]
    weight.view(-1)[places] = others[: len(places)]
    return weight


def held(ours: CpuLinear, weight: Tensor) -> Tensor:
    compact = ours.compact(weight)
    assert compact is not None
    return compact


SHAPES = [(64, 64), (200, 96), (130, 7), (1, 33), (1000, 576), (70, 5000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_lost(ours: CpuLinear, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    (size_out, size_in), weight = shape, weight_of(*shape)
    compact = held(ours, weight)
    rows = ours.embedding_compact(torch.arange(size_out), compact.data_ptr(), size_in, size_out, 0)
    assert torch.equal(rows.view(torch.int16), weight.view(torch.int16))
    height, depth, step = ours.panel
    num_panels, padded = -(-size_out // height), -(-size_in // (depth * step)) * depth * step
    packed = torch.full((num_panels, padded // step, height, step), 7, dtype=torch.bfloat16)
    ours.expand(compact.data_ptr(), packed.data_ptr(), size_out, size_in)
    plain = F.pad(weight, (0, padded - size_in, 0, num_panels * height - size_out))
    expected = plain.view(num_panels, height, padded // step, step).transpose(1, 2).contiguous()
    assert torch.equal(packed.view(torch.int16), expected.view(torch.int16))


def test_it_takes_three_quarters(ours: CpuLinear) -> None:
    weight = (0.02 * torch.randn(960, 576)).bfloat16()
    assert 0.75 < len(held(ours, weight)) / weight.nbytes < 0.76


def test_numbers_of_all_magnitudes_are_not_held_so(ours: CpuLinear) -> None:
    bits = torch.randint(-(2**15), 2**15, (256, 512), dtype=torch.int16)
    assert ours.compact(bits.view(torch.bfloat16)) is None
    for dtype in (torch.float32, torch.float16):
        assert CpuLinear(dtype).compact(torch.ones(64, 64, dtype=dtype)) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_number_of_rows(shape: tuple[int, int], threads: int, bias: bool, ours: CpuLinear) -> None:
    """Up to a group of rows, some groups, so many that threads take parts as they come, and panels kept in slabs."""
    torch.manual_seed(0)
    (size_out, size_in), before = shape, torch.get_num_threads()
    weight = (0.05 * torch.randn(shape)).bfloat16()
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 2.0**-30  # rare ones ..
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 37.0  # .. of which some show
    added = torch.randn(size_out).bfloat16() if bias else None
    torch.set_num_threads(threads)
    try:
        ours = CpuLinear(torch.bfloat16)
        address = (compact := held(ours, weight)).data_ptr()
        for rows in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 40, 201):
            x = torch.randn(rows, size_in).bfloat16()
            exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
            out = ours.linear_compact(x, address, added, size_out)
            wide = ours.linear_compact(x, address, added, size_out, widens=True)
            assert out.dtype == torch.bfloat16 and wide.dtype == torch.float32 and torch.equal(out.float(), wide)
            scale = x.double().abs() @ weight.double().abs().T
            assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * scale).all()
        assert len(compact)
    finally:
        torch.set_num_threads(before)


def test_a_bound_weight_is_laid_out_for_more_rows_than_are_ours(
    ours: CpuLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one shape share the memory for that, and each has its own numbers."""
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: 4)
    weights = [(0.05 * torch.randn(192, 96)).bfloat16() for _ in range(2)]
    products = [linear.bind(weight.clone(), ours=ours) for weight in weights]
    for rows in (3, 4, 5, 60):
        for product, weight in zip(products, weights, strict=True):
            x = torch.randn(rows, 96).bfloat16()
            torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    assert len([each for each in linear._Panels._all if each[1] == (192, 96)]) == 1
    del products, product
    assert not [each for each in linear._Panels._all if each[1] == (192, 96)]
