"""Before and after the experts' products: pairs of token and expert sorted by expert, and each token's weighted sum.

A program an expert goes through the ids of all pairs: it counts those of the experts before it, which gives its first
row, and then gives its own pairs their rows. One more program has the pairs of other ranks' experts. Nothing waits and
nothing depends on the order in which programs run. Definitions: `eager_moe.plan_experts`, `eager_moe.combine`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager_moe import ExpertPlan
from .interpreter import mend_interpreter
from .rows import power_of_two

mend_interpreter()

_PAIRS = 2048  # that a program looks at together
_MAX_BLOCK = 1024


@triton.jit(do_not_specialize=["num_pairs", "first"])
def _plan_kernel(
    ids: tl.tensor,
    pairs: tl.tensor,
    starts: tl.tensor,
    places: tl.tensor,
    num_pairs: tl.tensor,
    first: tl.tensor,
    NUM_LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)  # NUM_LOCAL: none of this rank's
    offset = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in range(0, num_pairs, BLOCK):
        id = tl.load(ids + begin + offset, mask=begin + offset < num_pairs, other=-1) - first
        before += ((id >= 0) & (id < expert) & (begin + offset < num_pairs)).to(tl.int32)
    row = tl.sum(before, axis=0)
    tl.store(starts + expert, row)

    for begin in range(0, num_pairs, BLOCK):
        pair = begin + offset
        id = tl.load(ids + pair, mask=pair < num_pairs, other=-1) - first
        id = tl.where((id >= 0) & (id < NUM_LOCAL), id, NUM_LOCAL)
        mine = (id == expert) & (pair < num_pairs)
        place = row + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(pairs + place, pair, mask=mine & (expert < NUM_LOCAL))
        tl.store(places + pair, tl.where(expert < NUM_LOCAL, place, num_pairs), mask=mine)
        row += tl.sum(mine.to(tl.int32), axis=0)


def plan_experts(ids: Tensor, first: int, num_local: int) -> ExpertPlan:
    """`eager_moe.plan_experts`, without waiting: as many rows as there are pairs. ids: contiguous."""
    assert ids.is_contiguous() and ids.dtype == torch.int32
    num_pairs = ids.numel()
    pairs, places = torch.empty(num_pairs, dtype=torch.int32, device=ids.device), torch.empty_like(ids)
    starts = torch.empty(num_local + 1, dtype=torch.int32, device=ids.device)
    _plan_kernel[(num_local + 1,)](
        ids, pairs, starts, places, num_pairs, first, NUM_LOCAL=num_local, BLOCK=_PAIRS, num_warps=8
    )
    return ExpertPlan(pairs, starts, places, num_pairs)


@triton.jit(do_not_specialize=["num_pairs"])
def _combine_kernel(
    rows: tl.tensor,
    weights: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    num_pairs: tl.tensor,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + j)
        row = tl.load(rows + place * HIDDEN + cols, mask=(cols < HIDDEN) & (place < num_pairs), other=0.0)
        total += row.to(tl.float32) * weight
    tl.store(out + token * HIDDEN + cols, total.to(out.dtype.element_ty), mask=cols < HIDDEN)


def combine(rows: Tensor, weights: Tensor, plan: ExpertPlan) -> Tensor:
    """`eager_moe.combine`. rows, weights: contiguous."""
    num_tokens, top_k = weights.shape
    hidden = rows.shape[1]
    assert rows.is_contiguous() and weights.is_contiguous() and weights.dtype == torch.float32
    out = torch.empty((num_tokens, hidden), dtype=rows.dtype, device=rows.device)
    if out.numel():
        block = min(power_of_two(hidden), _MAX_BLOCK)
        _combine_kernel[(num_tokens, -(-hidden // block))](
            rows,
            weights,
            plan.places,
            out,
            plan.places.numel(),
            TOP_K=top_k,
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return out
