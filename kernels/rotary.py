"""Rotary position embedding (Su et al. 2021) of queries and keys, and the keys' and values' store into the paged cache.

    (a, b) -> (a cos - b sin, b cos + a sin)    for the pairs (i, i + width), or (2i, 2i + 1) if interleaved

One launch a layer: a program takes a token and some of its query heads, or of its KV heads. Layers without rotation
only store. Definitions: `eager.rotary_store_kv`, `eager.store_kv`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import power_of_two

_TILE = 2048  # elements of a program's heads: 128 threads, 16 each


@triton.jit
def _store(to: tl.tensor, x: tl.tensor, mask: tl.tensor, FINITE: tl.constexpr) -> None:
    """Rounds to the target's dtype; what is NaN or infinite then is stored as 0 if FINITE."""
    x = x.to(to.dtype.element_ty)
    if FINITE:
        x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)
    tl.store(to, x, mask=mask)


@triton.jit
def _copy(
    x: tl.tensor,  # the token's first head
    to: tl.tensor,
    x_stride: tl.tensor,  # from head to head
    to_stride: tl.tensor,
    heads: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    heads = heads[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (heads < HEADS) & (dims < HEAD_DIM)
    _store(to + heads * to_stride + dims, tl.load(x + heads * x_stride + dims, mask=mask, other=0.0), mask, True)


@triton.jit
def _rotate(
    x: tl.tensor,  # the token's first head
    to: tl.tensor,
    x_stride: tl.tensor,  # from head to head
    to_stride: tl.tensor,
    cos: tl.tensor,  # the token's row
    sin: tl.tensor,
    heads: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FINITE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    i = tl.arange(0, BLOCK_WIDTH)[None, :]
    heads = heads[:, None]
    if INTERLEAVED:
        first = 2 * i
        second = 2 * i + 1
    else:
        first = i
        second = i + WIDTH
    mask = (heads < HEADS) & (i < WIDTH)
    cosine = tl.load(cos + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    sine = tl.load(sin + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    a = tl.load(x + heads * x_stride + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + heads * x_stride + second, mask=mask, other=0.0).to(tl.float32)
    _store(to + heads * to_stride + first, a * cosine - b * sine, mask, FINITE)
    _store(to + heads * to_stride + second, b * cosine + a * sine, mask, FINITE)
    if 2 * WIDTH < HEAD_DIM:
        rest = 2 * WIDTH + tl.arange(0, BLOCK_REST)[None, :]
        mask = (heads < HEADS) & (rest < HEAD_DIM)
        kept = tl.load(x + heads * x_stride + rest, mask=mask, other=0.0)
        _store(to + heads * to_stride + rest, kept, mask, FINITE)


@triton.jit
def _rotary_store_kv_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,  # or None
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    query_token: tl.tensor,  # strides
    query_head: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    table_row: tl.tensor,
    key_slot: tl.tensor,
    key_slot_head: tl.tensor,
    value_slot: tl.tensor,
    value_slot_head: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_REST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)  # of heads; the query's come first
    QUERY_GROUPS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    position = tl.load(positions + token).to(tl.int64)
    cos += position * table_row
    sin += position * table_row
    if group < QUERY_GROUPS:
        heads = group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        _rotate(
            query + token * query_token,
            out + token * (HEADS * HEAD_DIM),
            query_head,
            HEAD_DIM,
            cos,
            sin,
            heads,
            HEADS,
            HEAD_DIM,
            WIDTH,
            INTERLEAVED,
            False,
            BLOCK_WIDTH,
            BLOCK_REST,
        )
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            heads = (group - QUERY_GROUPS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            _rotate(
                key + token * key_token,
                key_cache + slot * key_slot,
                key_head,
                key_slot_head,
                cos,
                sin,
                heads,
                KV_HEADS,
                HEAD_DIM,
                WIDTH,
                INTERLEAVED,
                True,
                BLOCK_WIDTH,
                BLOCK_REST,
            )
            if value is not None:
                _copy(
                    value + token * value_token,
                    value_cache + slot * value_slot,
                    value_head,
                    value_slot_head,
                    heads,
                    KV_HEADS,
                    VALUE_DIM,
                    BLOCK_VALUE,
                )


@triton.jit
def _store_kv_kernel(
    key: tl.tensor,
    value: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    slots: tl.tensor,
    key_token: tl.tensor,  # strides
    key_head: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    key_slot: tl.tensor,
    key_slot_head: tl.tensor,
    value_slot: tl.tensor,
    value_slot_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        key += token * key_token
        value += token * value_token
        to_key = key_cache + slot * key_slot
        to_value = value_cache + slot * value_slot
        _copy(key, to_key, key_head, key_slot_head, heads, KV_HEADS, HEAD_DIM, BLOCK_DIM)
        _copy(value, to_value, value_head, value_slot_head, heads, KV_HEADS, VALUE_DIM, BLOCK_VALUE)


def rotary_store_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """`eager.rotary_store_kv`. The elements of a head lie side by side everywhere, the slots of a cache evenly."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, width, value_dim = key.shape[1], cos.shape[1], value_cache.shape[3]
    _check_store(key, key_cache, slots)
    if value is not None:
        _check_store(value, value_cache, slots)
    assert key.shape[::2] == query.shape[::2] and query.dtype == key.dtype and _side_by_side(query)
    assert 2 * width <= head_dim and cos.shape == sin.shape and cos.is_contiguous() and sin.is_contiguous()
    assert positions.shape == (num_tokens,) and positions.is_contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if not num_tokens:
        return out
    block_heads, num_warps = _tile(max(num_heads, num_kv_heads), max(head_dim, value_dim))
    groups = -(-num_heads // block_heads) + -(-num_kv_heads // block_heads)
    _rotary_store_kv_kernel[(num_tokens, groups)](
        query,
        key,
        value,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        slots,
        out,
        *query.stride()[:2],
        *key.stride()[:2],
        *((0, 0) if value is None else value.stride()[:2]),
        cos.stride(0),
        *key_cache.stride()[1:3],
        *value_cache.stride()[1:3],
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        WIDTH=width,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        BLOCK_VALUE=power_of_two(value_dim),
        BLOCK_WIDTH=power_of_two(width),
        BLOCK_REST=power_of_two(head_dim - 2 * width),
        num_warps=num_warps,
    )
    return out


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """`eager.store_kv`. The elements of a head lie side by side everywhere, the slots of a cache evenly."""
    _check_store(key, key_cache, slots)
    _check_store(value, value_cache, slots)
    num_tokens, num_kv_heads, head_dim = key.shape
    if not num_tokens:
        return
    block_heads, num_warps = _tile(num_kv_heads, max(head_dim, value.shape[2]))
    _store_kv_kernel[(num_tokens, -(-num_kv_heads // block_heads))](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[1:3],
        *value_cache.stride()[1:3],
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value.shape[2],
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=power_of_two(head_dim),
        BLOCK_VALUE=power_of_two(value.shape[2]),
        num_warps=num_warps,
    )


def _tile(num_heads: int, head_dim: int) -> tuple[int, int]:
    """Heads and warps of a program."""
    block_dim = power_of_two(head_dim)
    block_heads = min(max(1, _TILE // block_dim), power_of_two(num_heads))
    return block_heads, max(1, min(4, block_heads * block_dim // 512))


def _side_by_side(heads: Tensor) -> bool:
    return heads.stride(-1) == 1 or heads.shape[-1] == 1


def _check_store(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    assert slots.shape == x.shape[:1] and slots.is_contiguous()
    assert cache.shape[2:] == x.shape[1:] and cache.dtype == x.dtype
    assert _side_by_side(x) and _side_by_side(cache)
    assert cache.stride(0) == cache.shape[1] * cache.stride(1) or len(cache) <= 1
