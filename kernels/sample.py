"""Draws by Gumbel-max over a vocabulary shard: the argmax of ``logits / temperature + noise``.

The noise is a hash of (key, token id): the mixer "lowbias32" (Wellons, hash-prospector) twice, then
``-log(-log(1 - u))``. Its bits are those of `eager_sample.counter_noise`; two logarithms make the rest equal to
rounding.
Definitions: `eager_sample.counter_noise`, `eager_sample.sample_shard`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import power_of_two

_BLOCK = 1024  # token ids of a program


@triton.jit
def _mix32(bits: tl.tensor) -> tl.tensor:
    bits = bits ^ (bits >> 16)
    bits = bits * tl.full((), 0x7FEB352D, tl.uint32)
    bits = bits ^ (bits >> 15)
    bits = bits * tl.full((), 0x846CA68B, tl.uint32)
    return bits ^ (bits >> 16)


@triton.jit
def _gumbel(first: tl.tensor, second: tl.tensor, token_ids: tl.tensor) -> tl.tensor:
    """Noise of a key's two words and token ids, all uint32."""
    bits = _mix32(token_ids * tl.full((), 0x9E3779B9, tl.uint32) + first)
    bits = _mix32(bits ^ second)
    uniform = ((bits >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    uniform = tl.minimum(uniform, 0.9999999403953552)  # 1 - 2^-24
    # -log1p(-u) = log(w) * u / (w - 1) with w = 1 - u as rounded, whose error both factors share (Kahan, in Goldberg
    # 1991, theorem 4).
    rest = 1.0 - uniform
    gap = tl.where(rest == 1.0, -1.0, rest - 1.0)
    exponential = tl.where(rest == 1.0, uniform, tl.log(rest) * (uniform / gap))
    return -tl.log(exponential)


@triton.jit
def _noise_kernel(
    keys: tl.tensor, token_ids: tl.tensor, out: tl.tensor, ids_row: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    ids = tl.load(token_ids + row * ids_row + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    tl.store(out + row * n + at, _gumbel(first, second, ids), mask=at < n)


@triton.jit
def _best(scores: tl.tensor, at: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest score and the lowest place in `at` that has it; NaN counts as the largest."""
    missing = scores != scores
    value = tl.max(tl.where(missing, float("-inf"), scores), axis=0)
    any_missing = tl.max(missing.to(tl.int32), axis=0) > 0
    hit = tl.where(any_missing, missing, scores == value)
    place = tl.min(tl.where(hit, at, 0x7FFFFFFF), axis=0)
    return tl.where(any_missing, float("nan"), value), place


@triton.jit
def _tile_kernel(
    logits: tl.tensor,
    temperatures: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    logits_row: tl.tensor,
    start: tl.tensor,
    LOCAL_VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The best of one tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row * logits_row + at, mask=at < LOCAL_VOCAB, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + row)
    if temperature != 0:
        first = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
        second = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
        scores = tl.math.div_rn(scores, temperature) + _gumbel(first, second, (start + at).to(tl.uint32))
    value, place = _best(scores, at)
    tl.store(values + row * tl.num_programs(1) + tile, value)
    tl.store(places + row * tl.num_programs(1) + tile, place)


@triton.jit
def _row_kernel(
    values: tl.tensor,
    places: tl.tensor,
    best_values: tl.tensor,
    best_ids: tl.tensor,
    start: tl.tensor,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The best of a row's tiles."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    scores = tl.load(values + row * TILES + tile, mask=tile < TILES, other=float("-inf"))
    value, best_tile = _best(scores, tile)
    place = tl.load(places + row * TILES + best_tile)
    tl.store(best_values + row, value)
    tl.store(best_ids + row, place.to(tl.int64) + start)


def counter_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """`eager_sample.counter_noise`. keys: int32 [num_rows, 2]; token_ids: int32 [n] or [num_rows, n]; contiguous."""
    assert keys.dtype == token_ids.dtype == torch.int32 and keys.is_contiguous() and token_ids.is_contiguous()
    num_rows, n = len(keys), token_ids.shape[-1]
    assert token_ids.dim() == 1 or len(token_ids) == num_rows
    out = torch.empty((num_rows, n), dtype=torch.float32, device=keys.device)
    if out.numel():
        stride = n if token_ids.dim() == 2 else 0
        _noise_kernel[(num_rows, -(-n // _BLOCK))](keys, token_ids, out, stride, n, BLOCK=_BLOCK, num_warps=4)
    return out


def sample_shard(logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """`eager_sample.sample_shard`, in two passes: the best of each tile of a row, then of the tiles."""
    num_rows, local_vocab = logits.shape
    assert logits.stride(1) == 1 and local_vocab
    assert temperatures.shape == (num_rows,) and temperatures.dtype == torch.float32 and temperatures.is_contiguous()
    assert keys.shape == (num_rows, 2) and keys.dtype == torch.int32 and keys.is_contiguous()
    best_values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return best_values, best_ids
    tiles = -(-local_vocab // _BLOCK)
    values = torch.empty((num_rows, tiles), dtype=torch.float32, device=logits.device)
    places = torch.empty((num_rows, tiles), dtype=torch.int32, device=logits.device)
    _tile_kernel[(num_rows, tiles)](
        logits,
        temperatures,
        keys,
        values,
        places,
        logits.stride(0),
        start,
        LOCAL_VOCAB=local_vocab,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    _row_kernel[(num_rows,)](
        values, places, best_values, best_ids, start, TILES=tiles, BLOCK=power_of_two(tiles), num_warps=1
    )
    return best_values, best_ids
