"""The experts of each token and their weights, from the router's logits; a program a token.

The experts stand in a table of groups by members, both filled up to powers of two. The best is taken `top_k` times, of
equals the one with the lowest number. NaN counts as lower than all numbers: whatever a token's logits are, its experts
are experts. Definition: `eager_moe.route`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager_moe import Routing
from .rows import power_of_two

_NONE = tl.constexpr(float("-inf"))  # not to be chosen
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _route_kernel(
    logits: tl.tensor,
    correction: tl.tensor,  # or None
    weights: tl.tensor,
    ids: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    GROUPS: tl.constexpr,  # of the table
    MEMBERS: tl.constexpr,
    CHOSEN: tl.constexpr,  # TOP_K, filled up
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)
    expert = group[:, None] * GROUP_SIZE + member[None, :]
    real = (group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :]
    logit = tl.load(logits + token * row_stride + expert, mask=real, other=_NONE).to(tl.float32)
    if SCORING == "softmax":
        exponential = tl.exp(logit - tl.max(tl.max(logit, axis=1), axis=0))
        scores = exponential / tl.sum(tl.sum(exponential, axis=1), axis=0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logit))
    else:
        scores = logit

    choice = scores
    if correction is not None:
        choice += tl.load(correction + expert, mask=real, other=0.0)
    choice = tl.where(choice > _LOWEST, choice, _LOWEST)
    choice = tl.where(real, choice, _NONE)
    if TOP_GROUPS < NUM_GROUPS:
        best = tl.max(choice, axis=1)
        if BEST_TWO:
            first = tl.argmax(choice, axis=1)
            best += tl.max(tl.where(member[None, :] == first[:, None], _NONE, choice), axis=1)
        open_groups = group < 0
        for _ in tl.static_range(TOP_GROUPS):
            taken = group == tl.argmax(best, axis=0)
            open_groups = open_groups | taken
            best = tl.where(taken, _NONE, best)
        choice = tl.where(open_groups[:, None], choice, _NONE)

    left, values = tl.reshape(choice, [GROUPS * MEMBERS]), tl.reshape(scores, [GROUPS * MEMBERS])
    at, rank = tl.arange(0, GROUPS * MEMBERS), tl.arange(0, CHOSEN)
    weight, chosen = tl.zeros([CHOSEN], dtype=tl.float32), tl.zeros([CHOSEN], dtype=tl.int32)
    for j in tl.static_range(TOP_K):
        taken = at == tl.argmax(left, axis=0)
        place = tl.sum(tl.where(taken, at, 0), axis=0)
        weight = tl.where(rank == j, tl.sum(tl.where(taken, values, 0.0), axis=0), weight)
        chosen = tl.where(rank == j, place // MEMBERS * GROUP_SIZE + place % MEMBERS, chosen)
        left = tl.where(taken, _NONE, left)

    asked = rank < TOP_K
    if SCORING == "softmax of chosen":
        weight = tl.where(asked, weight, _NONE)
        weight = tl.exp(weight - tl.max(weight, axis=0))
        weight /= tl.sum(weight, axis=0)
    if NORMALISE:
        weight /= tl.sum(weight, axis=0) + 1e-20
    tl.store(weights + token * TOP_K + rank, weight * scale, mask=asked)
    tl.store(ids + token * TOP_K + rank, chosen, mask=asked)


def route(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`eager_moe.route`. logits: [num_tokens, num_experts], the elements of a row side by side."""
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1 and num_experts % routing.num_groups == 0
    assert correction is None or (correction.shape == (num_experts,) and correction.dtype == torch.float32)
    weights = torch.empty((num_tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, routing.top_k), dtype=torch.int32, device=logits.device)
    if num_tokens:
        group_size = num_experts // routing.num_groups
        groups, members = power_of_two(routing.num_groups), power_of_two(group_size)
        _route_kernel[(num_tokens,)](
            logits,
            correction,
            weights,
            ids,
            logits.stride(0),
            routing.scale,
            TOP_K=routing.top_k,
            SCORING=routing.scoring,
            NORMALISE=routing.normalise,
            NUM_GROUPS=routing.num_groups,
            GROUP_SIZE=group_size,
            TOP_GROUPS=routing.top_groups,
            BEST_TWO=routing.group_score == "sum of two",
            GROUPS=groups,
            MEMBERS=members,
            CHOSEN=power_of_two(routing.top_k),
            num_warps=max(1, min(4, groups * members // 128)),
        )
    return weights, ids
