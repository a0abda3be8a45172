"""Draws tokens on the last stage, from logits that stay split over the vocabulary.

Every draw is an argmax: of the logits (greedy), or of ``logits / temperature + Gumbel noise`` (a draw from the
softmax). The noise depends on (seed, request, position, token id) alone, so each rank makes that of its own shard and
one all-gather of (best score, token id) a row settles the draw: the same on any mesh and in any batch.

Top-k, top-p and min-p keep some of the likeliest tokens. Each rank contributes its likeliest few (`_CANDIDATES`) and
its part of the normaliser, one all-gather again; where that proves too few, four times as many, until it is enough:
the result is exact, and the same on every rank.

Order as in transformers: temperature, top-k, top-p over what top-k left, min-p.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Ops
from ..mesh.collectives import Communicator
from ..shardformer.shard import Range
from .step import SampleRequest

_CANDIDATES = 128
_NEVER = float("-inf")
_COLDEST = 1e-6  # temperatures below it are taken for it: greedy but for equals, and no logit overflows


class Sampler:
    """Samples over one vocabulary shard, with the other ranks of `tp`. `vocabulary`: each rank's (start, stop)."""

    def __init__(self, tp: Communicator, vocabulary: Sequence[Range], ops: Ops, device: torch.device) -> None:
        self.tp, self.device = tp, device
        self.start, self.stop = vocabulary[tp.rank]
        self.largest_shard = max(stop - start for start, stop in vocabulary)
        self.noise = ops.counter_noise
        self.token_ids = torch.arange(self.start, self.stop, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, samples: Sequence[SampleRequest]) -> Tensor:
        """logits: float32 [num_rows, local_vocab], a row for each sample; may be overwritten.

        Returns token ids [num_rows], int64, the same on every rank of `tp`.
        """
        for row, sample in enumerate(samples):
            banned = [i - self.start for i in sample.banned if self.start <= i < self.stop]
            if banned:
                logits[row, banned] = _NEVER
        sampled = [r for r, s in enumerate(samples) if s.temperature]
        filtered = [r for r in sampled if samples[r].top_k or samples[r].top_p < 1 or samples[r].min_p]
        plain = sorted(set(sampled).difference(filtered))
        if plain:
            self._add_noise(logits, plain, samples)
        drawn = self._best(logits)
        if filtered:
            rows = torch.tensor(filtered, device=self.device)
            chosen = self._draw_filtered(logits.index_select(0, rows), [samples[r] for r in filtered])
            drawn.index_copy_(0, rows, chosen)
        return drawn

    def _best(self, scores: Tensor) -> Tensor:
        """[num_rows, local_vocab] -> the token id of the best score over all shards [num_rows]; ties to the lowest."""
        value, index = scores.max(dim=-1)
        if self.tp.size == 1:
            return index
        pairs = torch.stack((value.double(), index.double() + self.start))  # float64 holds both exactly
        gathered = self.tp.all_gather(pairs)  # [tp, 2, num_rows], shards in the order of their ids
        winner = gathered[:, 0].argmax(dim=0)
        return gathered[:, 1].gather(0, winner.unsqueeze(0)).squeeze(0).long()

    def _add_noise(self, logits: Tensor, rows: list[int], samples: Sequence[SampleRequest]) -> None:
        index = torch.tensor(rows, device=self.device)
        temperature = self._temperatures([samples[r] for r in rows])
        keys = torch.tensor([samples[r].key for r in rows], dtype=torch.int32, device=self.device)
        scores = logits.index_select(0, index).div_(temperature).add_(self.noise(keys, self.token_ids))
        logits.index_copy_(0, index, scores)

    def _temperatures(self, samples: Sequence[SampleRequest]) -> Tensor:
        """[num_rows, 1]"""
        return torch.tensor([[max(s.temperature, _COLDEST)] for s in samples], device=self.device)

    def _draw_filtered(self, logits: Tensor, samples: Sequence[SampleRequest]) -> Tensor:
        """Token ids [num_rows] drawn after top-k, top-p and min-p."""
        scaled = logits.div_(self._temperatures(samples))
        keys = torch.tensor([s.key for s in samples], dtype=torch.int32, device=self.device)
        local_mass = scaled.logsumexp(dim=-1, keepdim=True).double()
        count = max(_CANDIDATES, *(s.top_k + 1 for s in samples))
        while True:
            count = min(count, self.largest_shard)
            values, token_ids, mass, floor = self._candidates(scaled, local_mass, count)
            keep, complete = _filter(values, mass, floor, samples)
            if complete:
                break
            count *= 4
        scores = values.float() + self.noise(keys, token_ids.int())
        winner = scores.masked_fill_(~keep, _NEVER).argmax(dim=-1, keepdim=True)
        return token_ids.gather(1, winner).squeeze(1)

    def _candidates(self, scaled: Tensor, mass: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The likeliest tokens of all shards, `count` or fewer from each, descending.

        Returns float64 values and int64 token ids [num_rows, n], the log of the sum of exp over the whole vocabulary
        [num_rows, 1], and the value below which tokens may be missing [num_rows, 1].
        """
        size = min(count, scaled.shape[1])
        values, index = scaled.topk(size, dim=-1)
        floor = values[:, -1:].double() if size < scaled.shape[1] else torch.full_like(mass, _NEVER)
        filler = torch.full((len(scaled), count - size), _NEVER, dtype=torch.float64, device=self.device)
        packed = torch.cat(
            (values.double(), filler, index.double() + self.start, torch.zeros_like(filler), mass, floor), dim=-1
        )
        gathered = self.tp.all_gather(packed)  # [tp, num_rows, 2 * count + 2]
        masses, floors = gathered[:, :, -2:-1], gathered[:, :, -1:]
        by_row = gathered.transpose(0, 1)
        all_values = by_row[:, :, :count].reshape(len(scaled), -1)
        all_ids = by_row[:, :, count : 2 * count].reshape(len(scaled), -1)
        all_values, order = all_values.sort(dim=-1, descending=True, stable=True)
        return all_values, all_ids.gather(1, order).long(), masses.logsumexp(dim=0), floors.amax(dim=0)


def _filter(values: Tensor, mass: Tensor, floor: Tensor, samples: Sequence[SampleRequest]) -> tuple[Tensor, bool]:
    """Which candidates remain [num_rows, n], and whether every token that should is among the candidates.

    values: descending; mass: log-sum-exp over the whole vocabulary; floor: tokens below it may be missing.
    """
    column = lambda numbers: torch.tensor(numbers, dtype=torch.float64, device=values.device).unsqueeze(1)  # noqa: E731
    top_k = column([s.top_k or float("inf") for s in samples])
    top_p, min_p = column([s.top_p for s in samples]), column([s.min_p for s in samples])

    place = torch.arange(values.shape[1], device=values.device, dtype=torch.float64)
    kth = values.gather(1, (top_k.clamp(max=values.shape[1]) - 1).long())
    keep = (place < top_k) | (values >= kth)  # equals of the k-th stay, as in transformers
    nothing_missing = floor == _NEVER
    all_of_top_k = top_k.isinf() | nothing_missing | (kth > floor)
    kept_mass = torch.where(top_k.isinf(), mass, values.masked_fill(~keep, _NEVER).logsumexp(dim=-1, keepdim=True))

    probability = (values - kept_mass).exp().masked_fill(~keep, 0)
    before = probability.cumsum(dim=-1) - probability  # of the likelier ones
    keep &= (before < top_p) | (place == 0) | (top_p >= 1)
    keep &= values >= values[:, :1] + min_p.log()
    keep &= values > _NEVER

    lowest = values.masked_fill(~keep, float("inf")).amin(dim=-1, keepdim=True)
    complete = nothing_missing | (lowest > floor)  # or nothing that would be kept
    return keep, bool((complete & all_of_top_k).all())
