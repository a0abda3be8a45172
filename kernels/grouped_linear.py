"""Each row's product with its expert's weight, in one launch.

How many rows an expert has only the device knows. The grid has as many tiles as there could be, and a program finds the
expert whose tile it is, if any, in the plan's `starts`:

    tiles of 4 rows        expert 0, 5 rows    expert 1, none    expert 2, 3 rows
    tile                   0: 0..3  1: 4                         2: 5..7             3: returns

Definition: `eager_moe.grouped_linear`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager_moe import ExpertPlan, GroupedLinear
from .rows import power_of_two


@dataclass(frozen=True)
class _Tile:
    rows: int
    columns: int
    depth: int  # of `in` at a time
    num_warps: int
    num_stages: int


_NARROW, _WIDE = _Tile(16, 64, 128, 4, 4), _Tile(128, 128, 64, 8, 3)
_NARROW_FLOAT32, _WIDE_FLOAT32 = _Tile(16, 64, 32, 4, 3), _Tile(64, 64, 32, 8, 2)  # exact, so without tensor cores


@triton.jit
def _grouped_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,  # or None
    pairs: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    NUM_EXPERTS: tl.constexpr,
    SIZE_IN: tl.constexpr,
    SIZE_OUT: tl.constexpr,
    TOP_K: tl.constexpr,  # None: row r takes x[r]
    EXPERTS: tl.constexpr,  # NUM_EXPERTS, filled up
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    first = tl.load(starts + experts, mask=experts < NUM_EXPERTS, other=0)
    last = tl.load(starts + experts + 1, mask=experts < NUM_EXPERTS, other=0)
    tiles = (last - first + ROWS - 1) // ROWS
    done = tl.cumsum(tiles, axis=0)  # tiles up to an expert's last
    expert = tl.sum((done <= tile).to(tl.int32), axis=0)
    if expert >= NUM_EXPERTS:
        return
    before = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    rows = tl.load(starts + expert) + (tile - before) * ROWS + tl.arange(0, ROWS)
    real = rows < tl.load(starts + expert + 1)
    source = rows
    if TOP_K is not None:
        source = tl.load(pairs + rows, mask=real, other=0) // TOP_K
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    steps = tl.arange(0, DEPTH)

    x_at = x + source.to(tl.int64)[:, None] * SIZE_IN + steps[None, :]
    weight_row = expert.to(tl.int64) * SIZE_OUT + columns
    weight_at = weight + weight_row[None, :] * SIZE_IN + steps[:, None]
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, SIZE_IN, DEPTH):
        inside = start + steps < SIZE_IN
        left = tl.load(x_at + start, mask=real[:, None] & inside[None, :], other=0.0)
        right = tl.load(weight_at + start, mask=(columns < SIZE_OUT)[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(left, right, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + weight_row, mask=columns < SIZE_OUT, other=0.0).to(tl.float32)[None, :]
    out_at = out + rows.to(tl.int64)[:, None] * SIZE_OUT + columns[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=real[:, None] & (columns < SIZE_OUT)[None, :])


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: ExpertPlan, by_token: bool) -> Tensor:
    """`eager_moe.grouped_linear`, without waiting. All contiguous."""
    num_experts, size_out, size_in = weight.shape
    assert x.is_contiguous() and weight.is_contiguous() and x.shape[1] == size_in and x.dtype == weight.dtype
    assert bias is None or (bias.is_contiguous() and bias.shape == weight.shape[:2])
    num_pairs = plan.num_rows
    out = torch.empty((num_pairs, size_out), dtype=x.dtype, device=x.device)
    if not out.numel() or not num_experts:
        return out
    crowded = num_pairs > 16 * num_experts
    if x.dtype is torch.float32:
        tile = _WIDE_FLOAT32 if crowded else _NARROW_FLOAT32
    else:
        tile = _WIDE if crowded else _NARROW
    # An expert's last tile may not be full, and an expert has a tile only if it has a row.
    tiles = min(num_pairs, num_pairs // tile.rows + min(num_pairs, num_experts))
    _grouped_kernel[(tiles, -(-size_out // tile.columns))](
        x,
        weight,
        bias,
        plan.pairs,
        plan.starts,
        out,
        NUM_EXPERTS=num_experts,
        SIZE_IN=size_in,
        SIZE_OUT=size_out,
        TOP_K=plan.top_k if by_token else None,
        EXPERTS=power_of_two(num_experts),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def bind_grouped_linear(weight: Tensor) -> GroupedLinear:
    """The product with `weight`, which it shares."""
    return lambda x, bias, plan, by_token: grouped_linear(x, weight, bias, plan, by_token)
