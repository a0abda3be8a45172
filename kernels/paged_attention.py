"""Attention over the paged KV cache in Triton; `eager.paged_attention` is the definition.

A program takes a tile of one KV head's rows and walks over their keys, or over a part of them, with an online softmax
(Milakov & Gimelshein 2018, Dao 2023). A row is a query with one of the query heads that read the KV head:

    3 heads a group, 4 queries      row     0  1  2 | 3  4  5 | 6  7  8 | 9 10 11
                                    query   0  0  0   1  1  1   2  2  2   3  3  3
                                    head    0  1  2   0  1  2   0  1  2   0  1  2

Sequences of few rows take a narrow tile each, others as many wide tiles as they need; a batch of both is two launches.
Where there are too few tiles to fill the device, several programs share the keys of each, and `_combine` puts their
results together.

Where values are the last elements of their keys (`eager.values_in_keys`), a key is read in two parts, and once:

    | rest | values |     scores = q_rest · rest + q · values,  out = softmax(scores) · values
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch import PagedBatch
from .eager import PLAIN, AttentionFeatures, values_in_keys
from .interpreter import mend_interpreter

mend_interpreter()

_LOG2E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e30)  # a row's maximum before it has seen a key; finite, since -inf - -inf is NaN
_MAX_SPLITS = tl.constexpr(256)

_NARROW_ROWS = 64  # a sequence of no more rows takes one tile
_NARROW_ROWS_MIXED = 32  # the same beside sequences that need wide tiles: most will have one query
_WIDE_HEAD = 256  # elements; of larger heads a program holds fewer rows


@dataclass(frozen=True)
class Tile:
    """What a program works on, and how it is compiled."""

    rows: int
    keys: int  # at a time
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that run on a multiprocessor at a time
    min_split: int = 256  # keys that are worth a program of their own


@dataclass(frozen=True)
class Heads:
    """What the tiles of keys and values are as wide as."""

    head_dim: int
    value_dim: int
    in_keys: bool  # values are the last elements of their keys

    @classmethod
    def of(cls, head_dim: int, value_dim: int | None = None, in_keys: bool = False) -> "Heads":
        return cls(head_dim, value_dim or head_dim, in_keys)

    @property
    def rest(self) -> int:
        """Elements of a key that come before its values; 0 where keys are not read in parts."""
        return self.head_dim - self.value_dim if self.in_keys else 0

    @property
    def main_tile(self) -> int:  # of keys; the part that is the values where they are in the keys
        return _tile_width(self.head_dim - self.rest)

    @property
    def rest_tile(self) -> int:
        return _tile_width(self.rest) if self.rest else 0

    @property
    def value_tile(self) -> int:
        return _tile_width(self.value_dim)

    @property
    def read(self) -> int:
        """Elements that a program holds for each key."""
        return self.main_tile + self.rest_tile + (0 if self.in_keys else self.value_tile)


def _tile_width(elements: int) -> int:
    return max(16, triton.next_power_of_2(elements))


@lru_cache
def tile_sizes(rows: int, heads: Heads, dtype: torch.dtype, shared_bytes: int) -> Tile:
    """The tile for sequences of up to `rows` rows; meant for Hopper.

    shared_bytes: of memory that a program can have. Loads run ahead of the products by `num_stages`, of which looking
    up the block takes half: 3 and 4 are alike, and hold one tile of keys and values besides the one in use.
    """
    dim, narrow = max(heads.main_tile, heads.value_tile), max(16, triton.next_power_of_2(rows))
    if dtype is torch.float32:  # exact products have no tensor cores: larger tiles do not fit into registers
        tile = Tile(16, 32, 8, 2, per_sm=3) if narrow == 16 else Tile(32, 16, 8, 2, per_sm=3)
        if dim > _WIDE_HEAD:
            tile = Tile(16, 16, 8, 2)
    elif dim > _WIDE_HEAD:  # a row's results take so many registers that prompts get by with half as many rows
        tile = Tile(narrow, 32, 4, 3, per_sm=2) if narrow <= 16 else Tile(min(narrow, 64), 32, 8, 3)
    elif rows <= _NARROW_ROWS:
        tile = Tile(narrow, 64 if dim <= 128 else 32, 4, 5, per_sm=3)
    else:
        tile = Tile(128, 64 if dim <= 128 else 32, 8, 3)
    while _shared_bytes(tile, heads, dtype) > shared_bytes:
        if tile.keys > 16:
            tile = replace(tile, keys=tile.keys // 2)
        elif tile.rows > 64:
            tile = replace(tile, rows=tile.rows // 2)
        else:
            return replace(tile, num_stages=1)
    return tile


def tile_choices(group: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> tuple[list[Tile], list[Tile]]:
    """Tiles that are worth timing, narrow ones for decodes and wide ones for prompts; the first of each is the usual.

    group: rows of a decode, which are the query heads of a KV head.
    """
    shared_bytes = _device(device)[1]
    narrow = tile_sizes(min(group, _NARROW_ROWS), heads, dtype, shared_bytes)
    wide = tile_sizes(1 << 16, heads, dtype, shared_bytes)
    if dtype is torch.float32:
        narrows = [(narrow.rows, 16, 4, 2, 3), (narrow.rows, 32, 4, 2, 3), (narrow.rows, 64, 8, 2, 2)]
        wides = [(16, 32, 8, 2, 3), (32, 32, 8, 2, 2), (64, 16, 8, 2, 2)]
    elif max(heads.main_tile, heads.value_tile) > _WIDE_HEAD:
        narrows = [(narrow.rows, *rest) for rest in ((16, 4, 3, 3), (64, 4, 3, 1), (32, 8, 5, 1))]
        wides = [(32, 32, 4, 3, 1), (64, 16, 8, 3, 1), (64, 64, 8, 3, 1)]
    else:
        narrows = [(narrow.rows, *rest) for rest in ((32, 4, 5, 4), (64, 4, 3, 4), (128, 4, 3, 2), (128, 8, 5, 1))]
        wides = [(64, 64, 4, 3, 2), (128, 32, 8, 3, 1), (128, 64, 4, 3, 1), (128, 128, 8, 3, 1)]

    def choices(usual: Tile, others: list[tuple[int, int, int, int, int]]) -> list[Tile]:
        tiles = [Tile(*other) for other in others]
        return [usual, *(t for t in tiles if t != usual and _shared_bytes(t, heads, dtype) <= shared_bytes)]

    return choices(narrow, narrows), choices(wide, wides)


def _shared_bytes(tile: Tile, heads: Heads, dtype: torch.dtype) -> int:
    """What a program needs, about: its queries, and keys and values once for each two stages."""
    held = max(1, tile.num_stages // 2) + (tile.rows >= 64)  # Hopper's products of 64 rows and more run behind
    query = tile.rows * (heads.main_tile + heads.rest_tile)
    return (query + tile.keys * held * heads.read) * dtype.itemsize + 8192


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    features: AttentionFeatures = PLAIN,
    *,
    tiles: tuple[Tile, Tile] | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Causal attention of a step's queries over the paged cache, which already holds the step's own keys.

    query: [num_tokens, heads, head_dim]; caches: [num_blocks, block_size, kv_heads, head_dim or value_dim], contiguous,
    or the values in the keys (`eager.values_in_keys`), all finite. tiles (narrow, wide) and num_splits stand in for the
    choice made here. Returns [num_tokens, heads, value_dim]; zeros for a sequence without keys, which pads a captured
    graph. The host waits for nothing, and the launches depend on shapes and on the numbers in `batch` alone.
    """
    num_tokens, heads, head_dim = query.shape
    value_dim, in_keys = value_cache.shape[-1], values_in_keys(key_cache, value_cache)
    block_size, kv_heads, group = key_cache.shape[1], key_cache.shape[2], heads // key_cache.shape[2]
    assert heads == kv_heads * group and query.stride()[1:] == (head_dim, 1), (query.shape, query.stride())
    assert key_cache.shape[:3] == value_cache.shape[:3] and key_cache.shape[3] == head_dim
    assert key_cache.is_contiguous() and (in_keys or value_cache.is_contiguous())
    out = torch.empty((num_tokens, heads, value_dim), dtype=query.dtype, device=query.device)
    if num_tokens == 0:
        return out

    num_sms, shared_bytes = _device(query.device)
    widths = Heads(head_dim, value_dim, in_keys)
    num_seqs, most, fewest = len(batch.key_lens), batch.max_query_len * group, batch.min_query_len * group
    narrow, wide = tiles or (
        tile_sizes(most if most <= _NARROW_ROWS else _NARROW_ROWS_MIXED, widths, query.dtype, shared_bytes),
        tile_sizes(most, widths, query.dtype, shared_bytes),
    )
    has_narrow, has_wide = fewest <= narrow.rows, most > narrow.rows
    num_wide = num_tokens * group // wide.rows + num_seqs if has_wide else 0  # or fewer
    if num_splits is None:
        span = min(batch.max_key_len, (features.window or batch.max_key_len) + batch.max_query_len)
        # Short sequences give up their places early: counted are as many of the longest as have all the keys.
        programs = kv_heads * (num_wide + max(1, batch.num_keys // max(1, batch.max_key_len)))
        places = num_sms * (wide if has_wide else narrow).per_sm
        num_splits = _choose_splits(programs, -(-span // narrow.min_split), places, has_wide)

    assert 1 <= num_splits <= _MAX_SPLITS.value, num_splits
    target, lse = out, None
    if num_splits > 1:
        target = torch.empty((num_splits, *out.shape), dtype=torch.float32, device=query.device)
        lse = torch.empty((num_splits, num_tokens, heads), dtype=torch.float32, device=query.device)
    for tile, num_tiles, is_narrow in ((narrow, num_seqs * has_narrow, True), (wide, num_wide, False)):
        if num_tiles:
            _attend[(num_tiles * kv_heads, num_splits)](
                query,
                key_cache,
                value_cache,
                target,
                lse,
                batch.block_tables,
                batch.query_starts,
                batch.key_lens,
                features.sinks,
                features.alibi_slopes,
                scale,
                query.stride(0),
                batch.block_tables.stride(0),
                num_tokens,
                num_seqs,
                num_tiles,
                num_splits,
                BLOCK_SIZE=block_size,
                KV_HEADS=kv_heads,
                GROUP=group,
                HEAD_DIM=head_dim,
                VALUE_DIM=value_dim,
                REST=widths.rest,
                IN_KEYS=in_keys,
                MAIN_TILE=widths.main_tile,
                REST_TILE=widths.rest_tile,
                VALUE_TILE=widths.value_tile,
                WINDOW=features.window,
                SOFTCAP=features.softcap,
                NARROW=is_narrow,
                DONE_ROWS=0 if is_narrow or not has_narrow else narrow.rows,
                ROWS=tile.rows,
                KEYS=tile.keys,
                MIN_SPLIT=tile.min_split,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
    if lse is not None:
        _combine[(num_tokens * heads,)](
            target,
            lse,
            out,
            num_tokens * heads,
            num_splits,
            HEAD_DIM=value_dim,
            DIM=triton.next_power_of_2(value_dim),
            num_warps=4,
        )
    return out


@lru_cache
def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory for a program; of the interpreter, on the CPU, what is not small."""
    if device.type != "cuda":
        return 1, 1 << 20
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


@lru_cache(maxsize=4096)
def _choose_splits(programs: int, most: int, places: int, has_wide: bool) -> int:
    """The fewest splits that use the places nearly as well as the best number; programs take them in whole rounds.

    programs: without splits; most: splits that are worth it; places: for programs at a time.
    """
    if programs >= (places // 2 if has_wide else 4 * places):  # a wide tile's results are large to put together
        return 1

    def used(splits: int) -> float:
        return programs * splits / places / -(-programs * splits // places)

    counts = range(1, max(1, min(most, _MAX_SPLITS.value)) + 1)
    good = 0.85 * max(map(used, counts))
    return next(count for count in counts if used(count) >= good)


# What changes from step to step must not make a new kernel.
_CHANGING = ("table_stride", "num_tokens", "num_seqs", "num_tiles", "num_splits")


@triton.jit(do_not_specialize=_CHANGING)
def _attend(
    query: tl.tensor,  # [num_tokens, heads, HEAD_DIM]
    key_cache: tl.tensor,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM]
    value_cache: tl.tensor,  # [num_blocks, BLOCK_SIZE, KV_HEADS, VALUE_DIM]; not read if IN_KEYS
    out: tl.tensor,  # [num_splits, num_tokens, heads, VALUE_DIM]
    lse: tl.tensor,  # [num_splits, num_tokens, heads]: log2 of a row's sum of exp(score); None: there is one split
    block_tables: tl.tensor,  # [num_seqs, max_blocks]
    query_starts: tl.tensor,  # [num_seqs + 1]
    key_lens: tl.tensor,  # [num_seqs]
    sinks: tl.tensor,  # [heads] or None
    alibi_slopes: tl.tensor,  # [heads] or None
    scale: tl.tensor,
    query_stride: tl.tensor,
    table_stride: tl.tensor,
    num_tokens: tl.tensor,
    num_seqs: tl.tensor,
    num_tiles: tl.tensor,
    num_splits: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    REST: tl.constexpr,  # elements of a key before its value; 0: keys are one part
    IN_KEYS: tl.constexpr,  # a key's other part is its value
    MAIN_TILE: tl.constexpr,  # HEAD_DIM - REST, padded to a power of two
    REST_TILE: tl.constexpr,  # REST, padded; 0 if it is 0
    VALUE_TILE: tl.constexpr,  # VALUE_DIM, padded
    WINDOW: tl.constexpr,  # or None
    SOFTCAP: tl.constexpr,  # or None
    NARROW: tl.constexpr,  # a tile for each sequence
    DONE_ROWS: tl.constexpr,  # sequences of so many rows, or fewer, are another launch's or have no query
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    tile = num_tiles - 1 - tl.program_id(0) // KV_HEADS  # a prompt's last rows have the most keys: they go first
    if NARROW:
        sequence = tile
        first_row = 0
    else:
        sequence, first_tile = _sequence_of(tile, query_starts, num_seqs, GROUP, ROWS)
        first_row = (tile - first_tile) * ROWS
    first_query = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - first_query
    key_len = tl.load(key_lens + sequence)
    num_rows = query_len * GROUP
    if (num_rows <= DONE_ROWS) | (first_row >= num_rows):
        return
    if NARROW and num_rows > ROWS:
        return

    row = first_row + tl.arange(0, ROWS)
    is_row = row < num_rows
    token = first_query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = key_len - query_len + row // GROUP  # [ROWS]
    MAIN: tl.constexpr = HEAD_DIM - REST
    dim = tl.arange(0, MAIN_TILE)
    value_dim = tl.arange(0, VALUE_TILE)

    # This split's keys: start .. stop - 1 of those that the tile's rows see.
    start = 0
    stop = key_len - query_len + (tl.minimum(first_row + ROWS, num_rows) - 1) // GROUP + 1
    first_position = key_len - query_len + first_row // GROUP
    if WINDOW is not None:
        start = tl.maximum(first_position - WINDOW + 1, 0)
    share = tl.maximum((stop - start + num_splits - 1) // num_splits, MIN_SPLIT)
    share = (share + KEYS - 1) // KEYS * KEYS
    start += split * share
    stop = tl.minimum(start + share, stop)
    result = (split.to(tl.int64) * num_tokens + token) * (KV_HEADS * GROUP) + head  # [ROWS]
    if lse is not None and (start >= stop) & (split > 0):
        tl.store(lse + result, tl.full([ROWS], float("-inf"), tl.float32), mask=is_row)
        return

    query += (token.to(tl.int64) * query_stride + head * HEAD_DIM)[:, None]
    q = tl.load(query + REST + dim[None, :], mask=is_row[:, None] & (dim < MAIN)[None, :], other=0.0)
    if REST:
        rest_dim = tl.arange(0, REST_TILE)
        q_rest = tl.load(query + rest_dim[None, :], mask=is_row[:, None] & (rest_dim < REST)[None, :], other=0.0)
    highest = tl.full([ROWS], _LOWEST, tl.float32)  # of the scores so far, times log2(e) like all of them
    total = tl.zeros([ROWS], tl.float32)  # of exp2(score - highest)
    acc = tl.zeros([ROWS, VALUE_TILE], tl.float32)
    if sinks is not None and split == 0:
        highest = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2E

    # Key tiles that every row sees whole need no mask. It costs little while a narrow tile waits for memory.
    has_free: tl.constexpr = not NARROW and WINDOW is None
    free_stop = start
    if has_free:
        free_stop += tl.maximum(tl.minimum(first_position + 1, stop) - start, 0) // KEYS * KEYS
    for masked in tl.static_range(0 if has_free else 1, 2):
        for begin in range(free_stop if masked else start, stop if masked else free_stop, KEYS):
            key = begin + tl.arange(0, KEYS)
            place = tl.minimum(key, stop - 1) if masked else key  # past the end the last key again, and no weight
            block = tl.load(block_tables + sequence.to(tl.int64) * table_stride + place // BLOCK_SIZE)
            slot = block.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE
            cached = (slot * KV_HEADS + kv_head)[:, None]  # the head's place in the cache
            k = _load(key_cache + cached * HEAD_DIM + REST, dim, MAIN, MAIN_TILE)  # [KEYS, MAIN_TILE]
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [ROWS, KEYS]
            if REST:
                k_rest = _load(key_cache + cached * HEAD_DIM, rest_dim, REST, REST_TILE)
                scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision="ieee")
            if SOFTCAP is None:
                scores *= scale * _LOG2E
            else:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                scores = SOFTCAP * _LOG2E * (1 - 2 / (tl.exp2(scores * (scale * 2 * _LOG2E / SOFTCAP)) + 1))
            if alibi_slopes is not None:
                scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            if masked:
                seen = key[None, :] <= position[:, None]
                if WINDOW is not None:
                    seen &= key[None, :] > position[:, None] - WINDOW
                scores = tl.where(seen, scores, float("-inf"))

            higher = tl.maximum(highest, tl.max(scores, 1))
            fade = tl.exp2(highest - higher)
            weights = tl.exp2(scores - higher[:, None])
            total = total * fade + tl.sum(weights, 1)
            highest = higher
            if IN_KEYS:
                v = k
            else:
                v = _load(value_cache + cached * VALUE_DIM, value_dim, VALUE_DIM, VALUE_TILE)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

    divisor = tl.where(total > 0, total, 1.0)  # nothing seen: zeros
    tl.store(
        out + result[:, None] * VALUE_DIM + value_dim[None, :],
        (acc / divisor[:, None]).to(out.dtype.element_ty),
        mask=is_row[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
    if lse is not None:
        tl.store(lse + result, highest + tl.log2(divisor), is_row)


@triton.jit
def _load(rows: tl.tensor, dim: tl.tensor, SIZE: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """[rows, TILE]: the first SIZE elements of each row, then zeros. rows: pointers [rows, 1]; dim: 0 .. TILE - 1."""
    if TILE == SIZE:
        return tl.load(rows + dim[None, :])
    else:
        return tl.load(rows + dim[None, :], mask=(dim < SIZE)[None, :], other=0.0)


@triton.jit
def _sequence_of(
    tile: tl.tensor, query_starts: tl.tensor, num_seqs: tl.tensor, GROUP: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The sequence that a wide tile is of, and the first of that sequence's tiles.

    Sequence i begins at tile ``query_starts[i] * GROUP // ROWS + i``: those before, the last of each cut short, need no
    more.
    """
    low = num_seqs * 0
    first_tile = low
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        begin = tl.load(query_starts + middle) * GROUP // ROWS + middle
        is_before = begin <= tile
        low = tl.where(is_before, middle, low)
        first_tile = tl.where(is_before, begin, first_tile)
        high = tl.where(is_before, high, middle)
    return low, first_tile


@triton.jit(do_not_specialize=("num_rows", "num_splits"))
def _combine(
    partial: tl.tensor,  # [num_splits, num_rows, HEAD_DIM]: results of each split, a row being a token's head
    lse: tl.tensor,  # [num_splits, num_rows]
    out: tl.tensor,  # [num_rows, HEAD_DIM]
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr = 32,  # read at a time
) -> None:
    """``sum(exp2(lse) * partial) / sum(exp2(lse))`` over the splits; of one whose lse is -inf nothing is read."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    all_splits = tl.arange(0, _MAX_SPLITS)
    every = tl.load(lse + all_splits * num_rows.to(tl.int64) + row, mask=all_splits < num_splits, other=float("-inf"))
    highest = tl.maximum(tl.max(every, 0), _LOWEST)
    total = tl.sum(tl.exp2(every - highest), 0)
    acc = tl.zeros([DIM], tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        place = split.to(tl.int64) * num_rows + row
        weight = tl.load(lse + place, mask=split < num_splits, other=float("-inf"))
        is_used = (weight > float("-inf"))[:, None] & (dim < HEAD_DIM)[None, :]
        part = tl.load(partial + place[:, None] * HEAD_DIM + dim[None, :], mask=is_used, other=0.0)
        acc += tl.sum(tl.exp2(weight - highest)[:, None] * part, 0)
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dim, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)
