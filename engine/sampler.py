"""Draws tokens on the last stage, from logits that stay split over the vocabulary.

Every draw is an argmax: of the logits (greedy), or of ``logits / temperature + Gumbel noise`` (a draw from the
softmax). The noise depends on (seed, request, position, token id) alone, so each rank makes that of its own shard and
one all-gather of (best score, token id) a row settles the draw: the same on any mesh and in any batch.

Top-k, top-p and min-p keep some of the likeliest tokens. Each rank contributes its likeliest few (`_CANDIDATES`) and
its part of the normaliser, one all-gather again. Whether these were enough is known with the draw (`Draw.complete`);
rows for which they were not are drawn again from four times as many, until it is enough: the result is exact, and the
same on every rank.

Order as in transformers: temperature, top-k, top-p over what top-k left, min-p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import Ops
from ..mesh.collectives import Communicator
from ..shardformer.shard import Range
from .staging import Shapes
from .step import SampleRequest

_CANDIDATES = 128
_REDRAWN_AT_ONCE = 8  # rows: with up to the whole vocabulary for candidates, they take much memory
_NEVER = float("-inf")
_COLDEST = 1e-6  # temperatures below it are taken for it: greedy but for equals, and no logit overflows


@dataclass(frozen=True)
class Draws:
    """What a step draws, as arrays that are still on the host; made by `Sampler.plan`."""

    samples: Sequence[SampleRequest]
    is_greedy: bool  # all are
    filtered: list[int]  # rows with top-k, top-p or min-p
    forces: bool  # whether some rows' tokens are given
    num_candidates: int  # of each rank, for a filtered row

    @property
    def shapes(self) -> Shapes:
        num_rows, num_filtered = len(self.samples), len(self.filtered)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if not self.is_greedy:
            shapes["temperatures"] = (torch.float32, (num_rows,))  # 0: greedy, and filtered, which come later
            shapes["keys"] = (torch.int32, (num_rows, 2))
        if self.forces:
            shapes["forced"] = (torch.int64, (num_rows,))
        if self.filtered:
            shapes["filtered"] = (torch.int64, (num_filtered,))
            shapes["filtered_temperatures"] = (torch.float32, (num_filtered, 1))
            shapes["filters"] = (torch.float64, (3, num_filtered, 1))  # top-k, top-p, min-p
        return shapes

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        if not self.is_greedy:
            host["temperatures"][:] = [max(s.temperature, _COLDEST) if s.temperature else 0.0 for s in self.samples]
            host["keys"][:] = [s.key for s in self.samples]
        if self.forces:
            host["forced"][:] = [s.forced for s in self.samples]
        if self.filtered:
            samples = [self.samples[row] for row in self.filtered]
            host["temperatures"][self.filtered] = 0.0
            host["filtered"][:] = self.filtered
            host["filtered_temperatures"][:, 0] = [max(s.temperature, _COLDEST) for s in samples]
            host["filters"][0, :, 0] = [s.top_k or float("inf") for s in samples]
            host["filters"][1, :, 0] = [s.top_p for s in samples]
            host["filters"][2, :, 0] = [s.min_p for s in samples]


@dataclass(frozen=True)
class Draw:
    """Tokens that were drawn, on the device."""

    token_ids: Tensor  # [num_rows] int64, the same on every rank of `tp`
    complete: Tensor | None = None  # [num_filtered] bool: whether a filtered row is final; None: all rows are
    filtered: "Filtered | None" = None

    @property
    def numbers(self) -> Tensor:
        """Token ids, and after them whether the filtered rows are complete: int64."""
        return self.token_ids if self.complete is None else torch.cat((self.token_ids, self.complete.long()))


@dataclass(frozen=True)
class Filtered:
    """Rows that are drawn after top-k, top-p and min-p."""

    rows: Tensor  # [num_filtered] int64
    scaled: Tensor  # [num_filtered, local_vocab]: logits / temperature
    keys: Tensor  # [num_filtered, 2] int32
    filters: Tensor  # [3, num_filtered, 1] float64
    num_candidates: int

    def select(self, index: Tensor) -> "Filtered":
        return Filtered(
            rows=self.rows.index_select(0, index),
            scaled=self.scaled.index_select(0, index),
            keys=self.keys.index_select(0, index),
            filters=self.filters.index_select(1, index),
            num_candidates=self.num_candidates,
        )


class Sampler:
    """Samples over one vocabulary shard, with the other ranks of `tp`. `vocabulary`: each rank's (start, stop).

    The host waits for nothing but in `redraw`.
    """

    def __init__(self, tp: Communicator, vocabulary: Sequence[Range], ops: Ops, device: torch.device) -> None:
        self.tp, self.device = tp, device
        self.start, self.stop = vocabulary[tp.rank]
        self.largest_shard = max(stop - start for start, stop in vocabulary)
        self._zeros = torch.zeros(0, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
        self.sample_shard, self.likeliest, self.draw_filtered = ops.sample_shard, ops.likeliest, ops.draw_filtered

    def plan(self, samples: Sequence[SampleRequest]) -> Draws:
        """What drawing takes, for the host to send to the device."""
        is_greedy = not any(s.temperature for s in samples)
        filtered = [
            r for r, s in enumerate(samples) if s.temperature and s.forced < 0 and (s.top_k or s.top_p < 1 or s.min_p)
        ]
        count = max(_CANDIDATES, *(samples[r].top_k + 1 for r in filtered)) if filtered else 0
        return Draws(samples, is_greedy, filtered, any(s.forced >= 0 for s in samples), min(count, self.largest_shard))

    def __call__(self, logits: Tensor, draws: Draws, arrays: Mapping[str, Tensor]) -> Draw:
        """logits: float32 [num_rows, local_vocab], a row for each sample; may be overwritten. arrays: those of `draws`,
        on the device."""
        draw = self._draw(logits, draws, arrays)
        if not draws.forces:
            return draw
        forced = arrays["forced"]  # of which no row is filtered
        return replace(draw, token_ids=torch.where(forced < 0, draw.token_ids, forced))

    def _draw(self, logits: Tensor, draws: Draws, arrays: Mapping[str, Tensor]) -> Draw:
        if not draws.filtered:
            return Draw(self._best(logits, draws, arrays))
        own = logits if len(draws.filtered) == len(logits) else logits.index_select(0, arrays["filtered"])
        filtered = Filtered(
            rows=arrays["filtered"],
            scaled=own.div_(arrays["filtered_temperatures"]).contiguous(),
            keys=arrays["keys"].index_select(0, arrays["filtered"]),
            filters=arrays["filters"],
            num_candidates=draws.num_candidates,
        )
        drawn, complete = self._draw_among(filtered)
        if len(draws.filtered) < len(draws.samples):
            drawn = self._best(logits, draws, arrays).index_copy_(0, filtered.rows, drawn)
        if draws.num_candidates == self.largest_shard:  # all there are
            return Draw(drawn)
        return Draw(drawn, complete, filtered)

    def redraw(self, draw: Draw, complete: Sequence[bool]) -> Tensor:
        """A draw's token ids, made final. complete: what the draw says, which every rank of `tp` knows alike."""
        assert draw.filtered is not None
        token_ids = draw.token_ids.clone()
        short = [row for row, is_complete in enumerate(complete) if not is_complete]
        for first in range(0, len(short), _REDRAWN_AT_ONCE):
            index = torch.tensor(short[first : first + _REDRAWN_AT_ONCE], device=self.device)
            filtered = draw.filtered.select(index)
            drawn, enough = self._draw_among(filtered)
            while not enough.all():
                count = min(4 * filtered.num_candidates, self.largest_shard)
                filtered = replace(filtered, num_candidates=count)
                drawn, enough = self._draw_among(filtered)
            token_ids.index_copy_(0, filtered.rows, drawn)
        return token_ids

    def _best(self, logits: Tensor, draws: Draws, arrays: Mapping[str, Tensor]) -> Tensor:
        """The token id of the best score over all shards [num_rows]; ties to the lowest."""
        if draws.is_greedy:
            temperatures, keys = self._of_greedy(len(logits))
        else:
            temperatures, keys = arrays["temperatures"], arrays["keys"]
        value, token_id = self.sample_shard(logits, temperatures, keys, self.start)
        if self.tp.size == 1:
            return token_id
        gathered = self.tp.all_gather(torch.stack((value.double(), token_id.double())))  # float64 holds both exactly
        winner = gathered[:, 0].argmax(dim=0, keepdim=True)  # [tp, 2, num_rows], shards in the order of their ids
        return gathered[:, 1].gather(0, winner).squeeze(0).long()

    def _of_greedy(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Temperatures and keys."""
        temperatures, keys = self._zeros
        if len(temperatures) < num_rows:
            self._zeros = temperatures, keys = temperatures.new_zeros(num_rows), keys.new_zeros(num_rows, 2)
        return temperatures[:num_rows], keys[:num_rows]

    def _draw_among(self, filtered: Filtered) -> tuple[Tensor, Tensor]:
        """Token ids [num_filtered], and whether all that may be drawn were among the candidates."""
        values, token_ids, mass, floor = self._candidates(filtered.scaled, filtered.num_candidates)
        return self.draw_filtered(values, token_ids, mass, floor, filtered.filters, filtered.keys)

    def _candidates(self, scaled: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The likeliest tokens of all shards, `count` or fewer from each, descending; see `eager_sample.draw_filtered`.

        Returns values and token ids [num_rows, n], the log of the sum of exp over the whole vocabulary [num_rows, 1],
        and the value below which tokens may be missing [num_rows, 1].
        """
        size = min(count, scaled.shape[1])
        values, index, masses = self.likeliest(scaled, size)
        mass = masses.double()
        floor = values[:, -1:].double() if size < scaled.shape[1] else torch.full_like(mass, _NEVER)
        if self.tp.size == 1:
            return values, index, mass, floor
        filler = torch.full((len(scaled), count - size), _NEVER, dtype=torch.float64, device=self.device)
        packed = torch.cat(
            (values.double(), filler, index.double() + self.start, torch.zeros_like(filler), mass, floor), dim=-1
        )
        gathered = self.tp.all_gather(packed)  # [tp, num_rows, 2 * count + 2]
        shards, floors = gathered[:, :, -2:-1], gathered[:, :, -1:]
        by_row = gathered.transpose(0, 1)
        all_values = by_row[:, :, :count].reshape(len(scaled), -1).float()
        all_ids = by_row[:, :, count : 2 * count].reshape(len(scaled), -1)
        all_values, order = all_values.sort(dim=-1, descending=True, stable=True)
        return all_values, all_ids.gather(1, order).long(), shards.logsumexp(dim=0), floors.amax(dim=0)
