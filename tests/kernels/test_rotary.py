"""`kernels/rotary.py` against its definition."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.rotary")

Store = Callable[..., Tensor]


@dataclass
class Case:
    """A step's product of queries, keys and values, and caches whose other slots must stay."""

    heads: tuple[int, int]  # query, KV
    head_dim: int
    width: int
    dtype: torch.dtype
    device: torch.device
    num_tokens: int = 5
    num_blocks: int = 7
    block_size: int = 3
    value_dim: int | None = None  # None: head_dim
    product: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        heads, kv_heads = self.heads
        like = {"device": self.device}
        self.product = torch.randn(self.num_tokens, heads + 2 * kv_heads, self.head_dim, **like).to(self.dtype)
        angles = torch.rand(50, self.width, **like) * 100
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        self.positions = torch.randint(0, 50, (self.num_tokens,), **like)
        self.slots = torch.randperm(self.num_blocks * self.block_size, **like)[: self.num_tokens]
        cache = torch.randn(2, self.num_blocks, self.block_size, kv_heads, self.head_dim, **like).to(self.dtype)
        self.caches = cache[0], cache[1, ..., : self.value_dim].contiguous()

    def run(self, op: Store, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The rotated query (none if it only stores), and both caches after."""
        heads, kv_heads = self.heads
        query, key, value = self.product.split((heads, kv_heads, kv_heads), dim=1)
        value = value[..., : self.value_dim]
        caches, before = [cache.clone() for cache in self.caches], self.product.clone()
        if op.__name__ == "store_kv":
            op(key, value, *caches, self.slots)
            rotated = torch.zeros(0)
        else:
            rotated = op(query, key, value, self.cos, self.sin, self.positions, *caches, self.slots, interleaved)
        assert rotated.is_contiguous() and torch.equal(self.product.nan_to_num(), before.nan_to_num())
        return rotated, *caches

    def check(self, assert_same: Callable[[Tensor, Tensor], None], interleaved: bool = False) -> None:
        others = [slot for slot in range(self.num_blocks * self.block_size) if slot not in self.slots.tolist()]
        for name in ("rotary_store_kv",) if interleaved else ("rotary_store_kv", "store_kv"):
            ours, definition = (self.run(getattr(of, name), interleaved) for of in (kernel, eager))
            for tensor, expected in zip(ours, definition, strict=True):
                assert_same(tensor, expected)
            for cache, before in zip(ours[1:], self.caches, strict=True):
                assert torch.equal(cache.flatten(0, 1)[others], before.flatten(0, 1)[others])
            assert torch.equal(ours[2], definition[2]), "values are copied"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "dims", [(2, 1), (6, 3), (64, 32), (80, 40), (96, 48), (112, 56), (128, 64), (256, 128), (80, 16), (64, 3), (10, 0)]
)
def test_head_sizes(
    dims: tuple[int, int],
    interleaved: bool,
    dtype: torch.dtype,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    """(head size, pairs that turn)"""
    Case((3, 1), *dims, dtype, device).check(assert_same, interleaved)


@pytest.mark.parametrize("value_dim", [None, 5, 40])
def test_values_of_another_size(
    value_dim: int | None, dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    """None: they are in the keys, and nothing more is stored."""
    case = Case((3, 2), 20, 4, dtype, device)
    query, key, _ = case.product.split((3, 2, 2), dim=1)
    value = None if value_dim is None else torch.randn(5, 2, value_dim, device=device).to(dtype)
    caches = [[case.caches[0].clone(), torch.randn(7, 3, 2, value_dim or 12, device=device).to(dtype)]]
    caches.append([cache.clone() for cache in caches[0]])
    ours, defined = (
        (store(query, key, value, case.cos, case.sin, case.positions, *of, case.slots), *of)
        for store, of in zip((kernel.rotary_store_kv, eager.rotary_store_kv), caches, strict=True)
    )
    for tensor, expected in zip(ours, defined, strict=True):
        assert_same(tensor, expected)


@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (40, 33), (2, 35)], ids=str)
def test_heads_in_several_programs(
    heads: tuple[int, int], device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    Case(heads, 64, 32, torch.float32, device, num_tokens=2).check(assert_same)


@pytest.mark.parametrize("dims", [(64, 32), (24, 1), (16, 10)], ids=str)
def test_value_heads_of_another_size(
    dims: tuple[int, int], dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    """(head size, of values)"""
    Case((3, 2), dims[0], dims[0] // 4, dtype, device, value_dim=dims[1]).check(assert_same)


def test_value_heads_larger_than_key_heads(device: torch.device) -> None:
    """By their values alone: each is what it was, in its slot."""
    key, value = torch.randn(5, 2, 4, device=device), torch.randn(5, 2, 600, device=device)
    caches = torch.zeros(3, 3, 2, 4, device=device), torch.zeros(3, 3, 2, 600, device=device)
    slots = torch.tensor([8, 1, 3, 0, 7], device=device)
    kernel.store_kv(key, value, *caches, slots)
    for cache, stored in zip(caches, (key, value), strict=True):
        assert torch.equal(cache.flatten(0, 1)[slots], stored)


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_numbers_of_tokens(
    num_tokens: int, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    Case((3, 2), 8, 4, torch.float32, device, num_tokens=num_tokens).check(assert_same)


@pytest.mark.parametrize("padding", [[1], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_padding_is_not_stored(
    padding: list[int], device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    case = Case((3, 2), 8, 4, torch.float32, device)
    case.slots[padding] = -1
    case.check(assert_same)


@pytest.mark.parametrize("dims", [(8, 4), (8, 2)])
def test_what_is_not_finite_is_stored_as_zero(
    dims: tuple[int, int], dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    case = Case((1, 2), *dims, dtype, device)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device, dtype=dtype)
    case.product[0, 1:, :3] = bad
    case.product[1, 1:, 5:] = bad
    case.product[2, 1:] = torch.finfo(dtype).max  # turned by a cosine above 1, it overflows
    case.cos[case.positions[2]], case.sin[case.positions[2]] = 2.0, 0.0
    case.check(assert_same)
    stored = torch.stack(case.run(kernel.rotary_store_kv, False)[1:]).flatten(1, 2)[:, case.slots]
    assert torch.isfinite(stored).all() and not stored[0, 2, :, : 2 * dims[1]].any()


def test_caches_past_two_billion_elements(device: torch.device, assert_same: Callable[[Tensor, Tensor], None]) -> None:
    """Of memory that nothing touches but one slot."""
    case = Case((1, 1), 64, 32, torch.float16, device, num_tokens=1, num_blocks=1, block_size=1)
    slots = 2**31 // 64 + 5
    if device.type == "cuda":
        key_cache, value_cache = (torch.zeros(slots, 1, 1, 64, dtype=torch.float16, device=device) for _ in range(2))
    else:
        key_cache, value_cache = (torch.from_numpy(np.zeros((slots, 1, 1, 64), dtype=np.float16)) for _ in range(2))
    arguments = (*case.product.split((1, 1, 1), dim=1), case.cos, case.sin, case.positions)
    kernel.rotary_store_kv(*arguments, key_cache, value_cache, torch.tensor([slots - 1], device=device))
    stored = torch.stack((key_cache[-1:], value_cache[-1:]))
    assert_same(stored, torch.stack(case.run(eager.rotary_store_kv, False)[1:]))


@pytest.mark.cuda
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_real_size(
    interleaved: bool, dtype: torch.dtype, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    case = Case((32, 8), 128, 64, dtype, device, num_tokens=4096, num_blocks=300, block_size=16)
    case.check(assert_same, interleaved)
