"""``weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`` (Ba et al. 2016).

One program a row, or a few short rows; the variance is taken about the mean, never as a difference of two large
numbers, so that a row longer than a block is read three times. Definition: `eager.layer_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import RowTiles, as_rows


@triton.jit
def _load(x: tl.tensor, at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_normalised(
    centred: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_at: tl.tensor,
    cols: tl.tensor,
    mask: tl.tensor,
    HIDDEN: tl.constexpr,
) -> None:
    result = centred * scale[:, None] * _load(weight, cols, cols < HIDDEN)[None, :]
    if bias is not None:
        result += _load(bias, cols, cols < HIDDEN)[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,  # or None
    out: tl.tensor,
    num_rows: tl.tensor,
    inner: tl.tensor,  # row = index in the outer dim * inner + index in the inner dim
    x_outer: tl.tensor,
    x_inner: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_at = ((row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner)[:, None]
    out_at = (row.to(tl.int64) * HIDDEN)[:, None]
    row_mask = (row < num_rows)[:, None]
    cols = tl.arange(0, BLOCK)

    if HIDDEN <= BLOCK:  # the row stays in registers
        mask = row_mask & (cols < HIDDEN)[None, :]
        wide = _load(x, x_at + cols[None, :], mask)
        mean = tl.sum(wide, axis=1) / HIDDEN
        centred = tl.where(mask, wide - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / HIDDEN + eps)
        _store_normalised(centred, scale, weight, bias, out, out_at + cols[None, :], cols, mask, HIDDEN)
    else:
        sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            sums += _load(x, x_at + at[None, :], row_mask & (at < HIDDEN)[None, :])
        mean = tl.sum(sums, axis=1) / HIDDEN
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)[None, :]
            centred = tl.where(mask, _load(x, x_at + at[None, :], mask) - mean[:, None], 0.0)
            squares += centred * centred
        scale = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)[None, :]
            centred = _load(x, x_at + at[None, :], mask) - mean[:, None]
            _store_normalised(centred, scale, weight, bias, out, out_at + at[None, :], at, mask, HIDDEN)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`eager.layer_norm`. x: [..., hidden], the elements of a row side by side; weight, bias: [hidden], contiguous."""
    hidden = x.shape[-1]
    assert weight.shape == (hidden,) and weight.is_contiguous()
    assert bias is None or (bias.shape == (hidden,) and bias.is_contiguous())
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    rows = as_rows(x)
    tiles = RowTiles.of(rows)
    _layer_norm_kernel[(tiles.num_programs,)](
        rows,
        weight,
        bias,
        out,
        rows.shape[0] * rows.shape[1],
        rows.shape[1],
        *rows.stride()[:2],
        eps,
        HIDDEN=hidden,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=tiles.num_warps,
    )
    return out
