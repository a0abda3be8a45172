"""Mixture of experts in plain torch: route, sort by expert, multiply each expert's rows, add up each token's.

A module of its own, since these ops share a vocabulary that no other op uses. A token and one of its experts are a
*pair*; pair ``token * top_k + j`` is the token's j-th choice. A rank that holds some of the experts computes the pairs
that chose one of them, sorted by expert, as the *rows* of its products:

    3 tokens, top_k = 2             pair     0  1 | 2  3 | 4  5
    this rank holds experts 4..6    expert   5  1   4  5   0  4

                                    row      0  1 | 2  3 |       expert 6 has none
                                    pair     2  5   0  3
                                    starts   0      2      4  4
                                    places   2  6   0  3   6  1  (6, the number of pairs: another rank's)
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """How a router's logits become experts and weights."""

    top_k: int
    scoring: Literal["softmax", "sigmoid", "softmax of chosen"]  # "of chosen": after the choice, over the chosen alone
    normalise: bool = False  # the chosen weights are divided by their sum
    scale: float = 1.0  # multiplies the weights
    num_groups: int = 1  # of consecutive experts, equally many each
    top_groups: int = 1  # groups whose experts can be chosen
    group_score: Literal["max", "sum of two"] = "max"  # of the group's best expert, or of its best two


@dataclass(frozen=True)
class ExpertPlan:
    """Which pairs this rank's experts compute, and where; made once a layer, read by both products and their sum."""

    pairs: Tensor  # [num_pairs] int32: the pair that each row computes; meaningless from row starts[-1] on
    starts: Tensor  # [num_local_experts + 1] int32: the first row of each expert, then the number of rows
    places: Tensor  # [num_tokens, top_k] int32: the row of each pair, num_pairs if another rank's expert was chosen
    num_rows: int  # rows that products have: starts[-1] where that is known to the host, else num_pairs

    @property
    def top_k(self) -> int:
        return self.places.shape[1]


def route(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token: (weights float32 [num_tokens, top_k], ids int32 [num_tokens, top_k]), best first.

    logits: [num_tokens, num_experts]; correction: float32 [num_experts], added to the scores for the choice alone
    (DeepSeek-V3's balancing without a loss). Among equals torch.topk decides, but on a GPU the first. All in float32.
    """
    logits = logits.float()
    if routing.scoring == "softmax of chosen":
        chosen, ids = logits.topk(routing.top_k, dim=-1)
        weights = chosen.softmax(dim=-1)
    else:
        scores = logits.softmax(dim=-1) if routing.scoring == "softmax" else logits.sigmoid()
        choice = scores if correction is None else scores + correction
        if routing.top_groups < routing.num_groups:
            choice = _within_best_groups(choice, routing)
        ids = choice.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
    if routing.normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routing.scale, ids.int()


def _within_best_groups(choice: Tensor, routing: Routing) -> Tensor:
    """The scores of experts whose group is not among the best become -inf."""
    groups = choice.unflatten(1, (routing.num_groups, choice.shape[1] // routing.num_groups))
    best = groups.topk(1 if routing.group_score == "max" else 2, dim=-1).values.sum(dim=-1)
    shut = torch.ones_like(best, dtype=torch.bool)
    shut.scatter_(1, best.topk(routing.top_groups, dim=-1).indices, False)
    return groups.masked_fill(shut.unsqueeze(-1), float("-inf")).view_as(choice)


def plan_experts(ids: Tensor, first: int, num_local: int) -> ExpertPlan:
    """Sorts the pairs by expert, in their own order within one. ids: int32 [num_tokens, top_k].

    This rank holds `num_local` experts from `first` on. Waits for the device.
    """
    flat = ids.flatten() - first
    flat = flat.masked_fill((flat < 0) | (flat >= num_local), num_local)
    experts, pairs = flat.sort(stable=True)
    edges = torch.arange(num_local + 1, dtype=experts.dtype, device=ids.device)
    starts = torch.searchsorted(experts, edges, out_int32=True)
    num_rows = int(starts[-1])
    places = torch.full_like(flat, flat.numel())
    places[pairs[:num_rows]] = torch.arange(num_rows, dtype=flat.dtype, device=ids.device)
    return ExpertPlan(pairs.int(), starts, places.view_as(ids), num_rows)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plan: ExpertPlan, by_token: bool) -> Tensor:
    """Each row's product with its expert's weight: [num_rows, out], meaningless from row ``plan.starts[-1]`` on.

    x: [num_tokens, in], of which a row takes its pair's token, if `by_token`, else [num_rows, in], one for each row;
    weight: [num_local_experts, out, in]; bias: [num_local_experts, out]. Waits for the device.
    """
    out = torch.empty(plan.num_rows, weight.shape[1], dtype=x.dtype, device=x.device)
    if by_token:
        x = x[plan.pairs[: plan.num_rows].long() // plan.top_k]
    for expert, (start, stop) in enumerate(pairwise(plan.starts.tolist())):
        if start < stop:
            out[start:stop] = F.linear(x[start:stop], weight[expert], None if bias is None else bias[expert])
    return out


GroupedLinear = Callable[[Tensor, Tensor | None, ExpertPlan, bool], Tensor]
"""`grouped_linear` with a weight that it was bound to: x, bias, plan, by_token."""


def bind_grouped_linear(weight: Tensor) -> GroupedLinear:
    """The definition's product with `weight`, which it shares; other forms have the weight in a layout of their own."""
    return lambda x, bias, plan, by_token: grouped_linear(x, weight, bias, plan, by_token)


def combine(rows: Tensor, weights: Tensor, plan: ExpertPlan) -> Tensor:
    """The weighted sum of each token's rows, in float32, rounded once: [num_tokens, hidden]; 0 for a token without.

    rows: [num_rows, hidden], in the plan's order; weights: float32 [num_tokens, top_k].
    """
    ours = plan.places < plan.places.numel()
    places = plan.places.masked_fill(~ours, len(rows)).long()
    padded = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    return (padded[places].float() * weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)
