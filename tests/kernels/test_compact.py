"""Weights in 12, 20 or 28 bits an element: nothing is lost, and products are those of the weight."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshlm.kernels import eager, linear
from meshlm.kernels.cpu import CpuLinear, CpuOps, Unavailable
from meshlm.kernels.eager import KINDS


def has_bfloat16_products() -> bool:
    with open("/proc/cpuinfo") as cpuinfo:
        return "avx512_bf16" in cpuinfo.read()


# A model's dtype, and that of its checkpoint.
KINDS_OF_NUMBERS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.fixture(
    scope="module", params=KINDS_OF_NUMBERS, ids=["bfloat16", "float32", "float32 of float16", "float32 of bfloat16"]
)
def numbers(request: pytest.FixtureRequest) -> tuple[torch.dtype, torch.dtype]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def weights(numbers: tuple[torch.dtype, torch.dtype]) -> Callable[[Tensor], Tensor]:
    """Makes weights of numbers."""
    dtype, checkpoint = numbers
    return lambda exact: exact.to(checkpoint).to(dtype)


@pytest.fixture(scope="module")
def bits(numbers: tuple[torch.dtype, torch.dtype]) -> int:
    """That an element takes."""
    return {torch.bfloat16: 12, torch.float16: 20, torch.float32: 28}[numbers[1]]


@pytest.fixture(scope="module")
def ours(numbers: tuple[torch.dtype, torch.dtype]) -> CpuLinear:
    return compacting(numbers[0])


def compacting(dtype: torch.dtype) -> CpuLinear:
    try:
        ours = CpuLinear(dtype)
    except Unavailable as why:
        pytest.skip(str(why))
    if not ours.compacts:
        assert not has_bfloat16_products()
        pytest.skip("weights are held so only with AVX512-BF16")
    return ours


def every_number(size_out: int, size_in: int) -> Tensor:
    """As a model's, and in it every kind of number."""
    weight = 0.05 * torch.randn(size_out, size_in)
    others = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 1e-38, 3e-12, -2e9, 1e30, -3e38, -torch.inf, torch.nan])
    places = torch.randperm(weight.numel())[: len(others)]
    weight.view(-1)[places] = others[: len(places)]
    return weight


def held(ours: CpuLinear, weight: Tensor) -> Tensor:
    compact = ours.compact(weight)
    assert compact is not None
    return compact


SHAPES = [(64, 64), (200, 96), (130, 27), (1, 33), (1000, 576), (70, 5000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_lost(ours: CpuLinear, shape: tuple[int, int], weights: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    (size_out, size_in), weight = shape, weights(every_number(*shape))
    bits = torch.int16 if weight.itemsize == 2 else torch.int32
    compact = held(ours, weight)
    rows = ours.embedding_compact(torch.arange(size_out), compact.data_ptr(), size_in, size_out, 0)
    assert torch.equal(rows.view(bits), weight.view(bits))
    height, depth, step = ours.panel
    num_panels, padded = -(-size_out // height), -(-size_in // (depth * step)) * depth * step
    packed = torch.full((num_panels, padded // step, height, step), 7, dtype=weight.dtype)
    ours.expand(compact.data_ptr(), packed.data_ptr(), size_out, size_in)
    plain = F.pad(weight, (0, padded - size_in, 0, num_panels * height - size_out))
    expected = plain.view(num_panels, height, padded // step, step).transpose(1, 2).contiguous()
    assert torch.equal(packed.view(bits), expected.view(bits))


def test_an_element_takes_few_bits(ours: CpuLinear, weights: Callable[[Tensor], Tensor], bits: int) -> None:
    weight = weights(0.02 * torch.randn(960, 576))
    assert 0 < 8 * len(held(ours, weight)) / weight.numel() - bits < 0.16


@pytest.mark.parametrize("bit", range(16))
def test_one_number_in_which_more_is_told_is_not_lost(bit: int) -> None:
    """A checkpoint may have been changed."""
    ours = compacting(torch.float32)
    weight = (0.02 * torch.randn(128, 64)).bfloat16().float()
    weight.view(torch.int32)[77, 5] |= 1 << bit
    compact = held(ours, weight)
    assert round(8 * len(compact) / weight.numel()) == (28 if bit < 8 else 20)
    assert torch.equal(ours.embedding_compact(torch.arange(128), compact.data_ptr(), 64, 128, 0), weight)


def test_a_few_in_a_hundred_are_too_many_rare_ones(ours: CpuLinear, weights: Callable[[Tensor], Tensor]) -> None:
    """Adding them would take longer than reading fewer bits saves."""
    weight = weights(torch.randn(256, 512).sign() * (1 + torch.rand(256, 512)))
    others = torch.rand(256, 512) < 0.05
    weight[others] *= 2.0 ** -torch.randint(1, 60, (int(others.sum()),)).to(weight)
    assert ours.compact(weight) is None
    weight[others] = 1.5
    assert ours.compact(weight) is not None


def test_numbers_of_all_magnitudes_are_not_held_so(ours: CpuLinear) -> None:
    weight = (torch.randn(256, 512) * 2.0 ** torch.randint(-60, 60, (256, 512))).to(ours.torch_dtype)
    assert ours.compact(weight) is None and linear.bind_compact(weight, ours=ours) is None
    assert CpuLinear(torch.float16).compact(torch.ones(64, 64, dtype=torch.float16)) is None


def test_a_weight_of_another_dtype_is_left_to_others(ours: CpuLinear) -> None:
    """As a router's, which is float32 in a model that is not."""
    other = torch.float32 if ours.torch_dtype == torch.bfloat16 else torch.bfloat16
    weight, x = torch.randn(8, 96).to(other), torch.randn(3, 96).to(other)
    for product in (
        linear.bind(weight, ours=ours),
        linear.bind_tied(weight, False, ours)[0],
        linear.bind_shared(weight, ours),
    ):
        torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_number_of_rows(
    shape: tuple[int, int], threads: int, bias: bool, ours: CpuLinear, weights: Callable[[Tensor], Tensor]
) -> None:
    """Up to a group of rows, some groups, so many that threads take parts as they come, and panels kept in slabs."""
    torch.manual_seed(0)
    (size_out, size_in), before = shape, torch.get_num_threads()
    dtype = ours.torch_dtype
    weight = weights(0.05 * torch.randn(shape))
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 2.0**-30  # rare ones ..
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 37.0  # .. of which some show
    added = torch.randn(size_out).to(dtype) if bias else None
    torch.set_num_threads(threads)
    try:
        ours = CpuLinear(dtype)
        address = (compact := held(ours, weight)).data_ptr()
        for rows in (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 40, 201):
            x = torch.randn(rows, size_in).to(dtype)
            exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
            out = ours.linear_compact(x, address, added, size_out)
            assert out.dtype == dtype
            scale = x.double().abs() @ weight.double().abs().T
            rounding = torch.finfo(dtype).eps
            assert ((out.double() - exact).abs() <= rounding * exact.abs() + 2**-18 * scale).all()
        assert len(compact)
    finally:
        torch.set_num_threads(before)


def test_a_bound_weight_is_laid_out_for_more_rows_than_are_ours(
    ours: CpuLinear, weights: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one shape share the memory for that, and each has its own numbers."""
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: 4)
    dtype = ours.torch_dtype
    both = [weights(0.05 * torch.randn(192, 96)) for _ in range(2)]
    if linear._Panels.like(both[0], ours).address is None:
        pytest.skip("oneDNN's layout is another here")
    products = [linear.bind(weight.clone(), ours=ours) for weight in both]
    for rows in (3, 4, 5, 60):
        for product, weight in zip(products, both, strict=True):
            x = torch.randn(rows, 96).to(dtype)
            torch.testing.assert_close(product(x, None), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    assert list(linear._Panels._all) == [(ours, (192, 96))]
    del products, product
    assert not linear._Panels._all


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(128, 64), (384, 27), (640, 96), (128, 5000)], ids=str)
def test_a_gated_product_is_two_ops_in_one(
    shape: tuple[int, int], threads: int, bias: bool, ours: CpuLinear, weights: Callable[[Tensor], Tensor]
) -> None:
    """Rounded where they round: equal to the bit, but for rare elements, whose turn in a sum depends on the threads."""
    torch.manual_seed(0)
    (size_out, size_in), before = shape, torch.get_num_threads()
    dtype = ours.torch_dtype
    weight = weights(torch.randn(shape).sign() * (0.01 + torch.rand(shape)))
    added = torch.randn(size_out).to(dtype) if bias else None
    torch.set_num_threads(threads)
    try:
        ours = CpuLinear(dtype)
        plain, gated = held(ours, weight), held(ours, ours.in_turns(weight))
        for rows in (0, 1, 2, 6, 7, 9, 13, 40, 201, 431):
            x = torch.randn(rows, size_in).to(dtype)
            gate_up = ours.linear_compact(x, plain.data_ptr(), added, size_out)
            for kind in KINDS[:-1]:
                out = ours.linear_compact(x, gated.data_ptr(), added, size_out, kind)
                assert torch.equal(out, CpuOps(dtype).gated_activation(kind)(gate_up))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("size_out", [384, 200])
@pytest.mark.parametrize("most", [0, 4, 1024])
def test_every_bound_form_is_gated(
    most: int,
    size_out: int,
    kind: str,
    ours: CpuLinear,
    weights: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one op, after oneDNN's product of the same weight, or of one that cannot be had as one op."""
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: most)
    dtype = ours.torch_dtype
    ops, weight, bias = CpuOps(dtype), weights(0.1 * torch.randn(size_out, 96)), torch.randn(size_out).to(dtype)
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 2.0**-30  # rare ones ..
    weight.view(-1)[torch.randperm(weight.numel())[:9]] = 7.0  # .. of which some show
    product = linear.bind_gated(weight.clone(), kind, ours=ours, gated_activation=ops.gated_activation)
    for rows in (1, 3, 5, 60):
        x = torch.randn(rows, 96).to(dtype)
        expected = eager.gated_activation(kind)(F.linear(x, weight, bias))
        torch.testing.assert_close(product(x, bias), expected, rtol=4e-2, atol=4e-2)
