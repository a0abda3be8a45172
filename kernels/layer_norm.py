"""``weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`` (Ba et al. 2016), of the residual stream or of heads.

One program a row, or a few short rows; the variance is taken about the mean, never as a difference of two large
numbers, so that a row longer than a block is read three times. Definitions: `eager.add_layer_norm`,
`eager.head_layer_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import RowTiles, as_rows, summed


@triton.jit
def _store_normalised(
    centred: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    weight_at: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_at: tl.tensor,
    cols: tl.tensor,
    mask: tl.tensor,
) -> None:
    result = centred * scale[:, None]
    if weight is not None:
        result *= tl.load(weight + weight_at + cols, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        result += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + out_at + cols, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _add_layer_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,  # or None
    weight: tl.tensor,  # or None
    bias: tl.tensor,  # or None
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
    OWN_WEIGHTS: tl.constexpr,  # a row of weights for each index in the inner dim
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outer_at, inner_at = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    x_at = (outer_at * x_outer + inner_at * x_inner)[:, None]
    residual_at = (outer_at * residual_outer + inner_at * residual_inner)[:, None]
    weight_at = 0
    if OWN_WEIGHTS:
        weight_at = (inner_at * HIDDEN)[:, None]
    out_at = (row.to(tl.int64) * HIDDEN)[:, None]
    row_mask = (row < num_rows)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]

    if HIDDEN <= BLOCK:  # the row stays in registers
        mask = row_mask & (cols < HIDDEN)
        wide = summed(x, residual, x_at + cols, residual_at + cols, mask)
        if residual is not None:
            tl.store(total + out_at + cols, wide.to(total.dtype.element_ty), mask=mask)
        mean = tl.sum(wide, axis=1) / HIDDEN
        centred = tl.where(mask, wide - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / HIDDEN + eps)
        _store_normalised(centred, scale, weight, weight_at, bias, out, out_at, cols, mask)
    else:
        sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)
            wide = summed(x, residual, x_at + at, residual_at + at, mask)
            if residual is not None:
                tl.store(total + out_at + at, wide.to(total.dtype.element_ty), mask=mask)
            sums += wide
        mean = tl.sum(sums, axis=1) / HIDDEN
        squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)
            centred = summed(x, residual, x_at + at, residual_at + at, mask) - mean[:, None]
            centred = tl.where(mask, centred, 0.0)
            squares += centred * centred
        scale = tl.rsqrt(tl.sum(squares, axis=1) / HIDDEN + eps)
        for start in range(0, HIDDEN, BLOCK):
            at = start + cols
            mask = row_mask & (at < HIDDEN)
            centred = summed(x, residual, x_at + at, residual_at + at, mask) - mean[:, None]
            _store_normalised(centred, scale, weight, weight_at, bias, out, out_at, at, mask)


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`eager.add_layer_norm`. x, residual: [..., hidden] of one dtype, the elements of a row side by side."""
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    for parameter in (weight, bias):
        assert parameter is None or parameter.shape == x.shape[-1:]
    return _launch(x, residual, weight, bias, eps)


def head_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`eager.head_layer_norm`. x: [num_tokens, heads, head_dim], the elements of a head side by side."""
    assert weight.shape == x.shape[1:]
    return _launch(x, None, weight, None, eps)[0]


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    for parameter in (weight, bias):
        assert parameter is None or parameter.is_contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    if not x.numel():
        return out, total
    rows = as_rows(x)
    added = rows if residual is None else as_rows(residual)
    tiles = RowTiles.of(rows)
    _add_layer_norm_kernel[(tiles.num_programs,)](
        rows,
        None if residual is None else added,
        weight,
        bias,
        out,
        None if residual is None else total,
        rows.shape[0] * rows.shape[1],
        rows.shape[1],
        *rows.stride()[:2],
        *added.stride()[:2],
        eps,
        HIDDEN=x.shape[-1],
        OWN_WEIGHTS=weight is not None and weight.dim() == 2,
        ROWS=tiles.rows,
        BLOCK=tiles.block,
        num_warps=tiles.num_warps,
    )
    return out, total
