"""``weight * x / sqrt(mean(x²) + eps)`` (Zhang & Sennrich 2019), alone or after adding to the residual stream.

One program a row, or a few short rows; a row longer than a block is read twice. Definition: `eager.rms_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import RowTiles, as_rows, summed


@triton.jit
def _store_normalised(
    wide: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    out_at: tl.tensor,
    cols: tl.tensor,
    mask: tl.tensor,
    HIDDEN: tl.constexpr,
    OFFSET: tl.constexpr,
) -> None:
    factor = tl.load(weight + cols, mask=cols < HIDDEN, other=0.0).to(tl.float32)[None, :]
    normalised = wide * scale[:, None]
    if OFFSET == 0.0:
        result = normalised.to(out.dtype.element_ty).to(tl.float32) * factor
    else:
        result = normalised * (factor + OFFSET)
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,  # or None
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,  # or None, together with residual
    num_rows: tl.tensor,
    inner: tl.tensor,  # row = index in the outer dim * inner + index in the inner dim
    x_outer: tl.tensor,
    x_inner: tl.tensor,
    residual_outer: tl.tensor,
    residual_inner: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer_at, inner_at = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    x_at = (outer_at * x_outer + inner_at * x_inner)[:, None]
    residual_at = (outer_at * residual_outer + inner_at * residual_inner)[:, None]
    out_at = (row.to(tl.int64) * HIDDEN)[:, None]
    row_mask = (row < num_rows)[:, None]
    cols = tl.arange(0, BLOCK)

    if HIDDEN <= BLOCK:  # the row stays in registers
        mask = row_mask & (cols < HIDDEN)[None, :]
        wide = summed(x, residual, x_at + cols[None, :], residual_at + cols[None, :], mask)
        if residual is not None:
            tl.store(total + out_at + cols[None, :], wide.to(total.dtype.element_ty), mask=mask)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / HIDDEN + eps)
        _store_normalised(wide, scale, weight, out, out_at + cols[None, :], cols, mask, HIDDEN, OFFSET)
    else:
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)[None, :]
            wide = summed(x, residual, x_at + at[None, :], residual_at + at[None, :], mask)
            if residual is not None:
                tl.store(total + out_at + at[None, :], wide.to(total.dtype.element_ty), mask=mask)
            squares += wide * wide
        scale = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)[None, :]
            wide = summed(x, residual, x_at + at[None, :], residual_at + at[None, :], mask)
            _store_normalised(wide, scale, weight, out, out_at + at[None, :], at, mask, HIDDEN, OFFSET)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`eager.rms_norm`. x: [..., hidden], the elements of a row side by side; weight: [hidden], contiguous."""
    return _launch(x, None, weight, eps, offset)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`eager.add_rms_norm`. x, residual: [..., hidden] of one dtype, the elements of a row side by side."""
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    return _launch(x, residual, weight, eps, offset)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    assert weight.shape == (hidden,) and weight.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    if not x.numel():
        return out, total
    rows = as_rows(x)
    added = rows if residual is None else as_rows(residual)
    tiles = RowTiles.of(rows)
    _add_rms_norm_kernel[(tiles.num_programs,)](
        rows,
        None if residual is None else added,
        weight,
        out,
        None if residual is None else total,
        rows.shape[0] * rows.shape[1],
        rows.shape[1],
        *rows.stride()[:2],
        *added.stride()[:2],
        eps,
        HIDDEN=hidden,
        OFFSET=offset,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=tiles.num_warps,
    )
    return out, total
