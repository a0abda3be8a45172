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

import numpy as np
import torch
from torch import Tensor

from ..kernels import Ops
from ..mesh.collectives import Communicator
from ..shardformer.shard import Range
from .noise import Noise
from .staging import Shapes
from .step import SampleRequest, SampleSettings

_CANDIDATES = 128  # where no top-k says how many there are
_SPARE = 24  # beside those of top-k, for equals of the last
_REDRAWN_AT_ONCE = 8  # rows: with up to the whole vocabulary for candidates, they take much memory
_NEVER = float("-inf")
_STEPS_AHEAD = 16  # for which noise is made at once, while a batch stays as it is
_COLDEST = 1e-6  # temperatures below it are taken for it: greedy but for equals, and no logit overflows


class Settings:
    """How a batch's tokens are drawn; mostly the same for many steps, and then what is made of it is there already."""

    def __init__(self, of: Sequence[SampleSettings], most_candidates: int) -> None:
        self.of = of
        self.is_greedy = not any(s.temperature for s in of)
        self.seeds = np.array([s.seed for s in of], np.uint64)
        self.forces = any(s.forced >= 0 for s in of)  # some rows' tokens are given
        self.filtered = [  # rows with top-k, top-p or min-p
            r for r, s in enumerate(of) if s.temperature and s.forced < 0 and (s.top_k or s.top_p < 1 or s.min_p)
        ]
        filtered = [of[r] for r in self.filtered]
        self.needs_mass = any(s.top_p < 1 and not s.top_k for s in filtered)
        count = max((s.top_k + _SPARE if s.top_k else _CANDIDATES for s in filtered), default=0)
        self.num_candidates = min(count, most_candidates)  # of each rank, for a filtered row
        # Nothing shapes their logits beside the model, and nothing is told of these.
        self.are_plain = not any(s.slot >= 0 or s.logprobs is not None or s.num_candidates for s in of)
        self.arrays: dict[str, Tensor] = {}  # those of `shapes`, on the device, once they are there

    @property
    def shapes(self) -> Shapes:
        num_rows, num_filtered = len(self.of), len(self.filtered)
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if not self.is_greedy:
            shapes["temperatures"] = (torch.float32, (num_rows,))  # 0: greedy, and filtered, which come later
        if self.forces:
            shapes["forced"] = (torch.int64, (num_rows,))
        if self.filtered:
            shapes["filtered"] = (torch.int64, (num_filtered,))
            shapes["filtered_temperatures"] = (torch.float32, (num_filtered,))
            shapes["filters"] = (torch.float64, (3, num_filtered))  # top-k, top-p, min-p
        return shapes

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        if not self.is_greedy:
            host["temperatures"][:] = [_heat(s) for s in self.of]
        if self.forces:
            host["forced"][:] = [s.forced for s in self.of]
        if self.filtered:
            filtered = [self.of[row] for row in self.filtered]
            host["temperatures"][self.filtered] = 0.0
            host["filtered"][:] = self.filtered
            host["filtered_temperatures"][:] = [_heat(s) for s in filtered]
            host["filters"][0] = [s.top_k or float("inf") for s in filtered]
            host["filters"][1] = [s.top_p for s in filtered]
            host["filters"][2] = [s.min_p for s in filtered]

    def take(self, arrays: Mapping[str, Tensor]) -> None:
        """Keeps its arrays out of a step's, whose memory on a GPU is the next one's too, and else holds much more."""
        self.arrays = {name: arrays[name].clone() for name in self.shapes}


def _heat(settings: SampleSettings) -> float:
    return max(settings.temperature, _COLDEST) if settings.temperature else 0.0


@dataclass(frozen=True)
class Draws:
    """What a step draws; made by `Sampler.plan`. What of it is new is still on the host, as arrays."""

    settings: Settings
    are_new: bool  # the settings
    positions: Sequence[int] = ()  # of the tokens, if there is noise
    noise: Noise | None = None

    @property
    def _new_noise(self) -> Noise | None:
        return None if self.noise is None or self.noise.is_there else self.noise

    @property
    def shapes(self) -> Shapes:
        shapes = self.settings.shapes if self.are_new else {}
        return shapes if self._new_noise is None else {**shapes, **self._new_noise.shapes}

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        if self._new_noise is not None:
            self._new_noise.write(host)
        if self.are_new:
            self.settings.write(host)

    def take(self, arrays: Mapping[str, Tensor]) -> None:
        """Keeps what is new, for the steps that follow."""
        if self._new_noise is not None:
            self._new_noise.take(arrays)
        if self.are_new:
            self.settings.take(arrays)


@dataclass(frozen=True)
class Filtered:
    """Rows that are drawn after top-k, top-p and min-p."""

    rows: Tensor  # [num_filtered] int64
    logits: Tensor  # [num_filtered, local_vocab]
    temperatures: Tensor  # [num_filtered] float32
    keys: Tensor  # [num_filtered, 2] int32
    filters: Tensor  # [3, num_filtered] float64
    num_candidates: int
    needs_mass: bool

    def select(self, index: Tensor) -> "Filtered":
        return replace(
            self,
            rows=self.rows.index_select(0, index),
            logits=self.logits.index_select(0, index),
            temperatures=self.temperatures.index_select(0, index),
            keys=self.keys.index_select(0, index),
            filters=self.filters.index_select(1, index),
        )


@dataclass(frozen=True)
class Draw:
    """Tokens that were drawn, on the device."""

    numbers: Tensor  # int64: token ids [num_rows], the same on every rank of `tp`; whether each of `filtered` is final
    filtered: Filtered | None = None  # None: all rows are final

    @property
    def token_ids(self) -> Tensor:
        return self.numbers if self.filtered is None else self.numbers[: -len(self.filtered.rows)]

    @property
    def complete(self) -> Tensor | None:
        """Of each filtered row, whether it is final [num_filtered]; None: all rows are."""
        return None if self.filtered is None else self.numbers[-len(self.filtered.rows) :]


class Sampler:
    """Samples over one vocabulary shard, with the other ranks of `tp`. `vocabulary`: each rank's (start, stop).

    The host waits for nothing but in `redraw`.
    """

    def __init__(self, tp: Communicator, vocabulary: Sequence[Range], ops: Ops, device: torch.device) -> None:
        self.tp, self.device = tp, device
        self.start, self.stop = vocabulary[tp.rank]
        self.largest_shard = max(stop - start for start, stop in vocabulary)
        self._last: Draws | None = None  # the last step's
        self._zeros = torch.zeros(0, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
        self.sample_shard, self.likeliest, self.draw_filtered = ops.sample_shard, ops.likeliest, ops.draw_filtered

    def plan(self, samples: Sequence[SampleRequest]) -> Draws:
        """What drawing takes, for the host to send to the device."""
        of, last = [sample.settings for sample in samples], self._last
        are_new = last is None or last.settings.of != of
        settings = Settings(of, self.largest_shard) if last is None or are_new else last.settings
        if settings.is_greedy:
            return Draws(settings, are_new)
        positions = [sample.position for sample in samples]
        noise = None if last is None or are_new else last.noise
        if noise is None or not noise.has(positions):
            noise = Noise(settings.seeds, positions, 1 if are_new else _STEPS_AHEAD)
        return Draws(settings, are_new, positions, noise)

    def __call__(self, logits: Tensor, draws: Draws, arrays: Mapping[str, Tensor]) -> Draw:
        """logits: [num_rows, local_vocab], contiguous, a row for each sample, of any float dtype; arrays: those of
        `draws`, on the device."""
        settings, noise = draws.settings, draws.noise
        draws.take(arrays)
        self._last = draws
        if noise is None:
            return Draw(self._forced(self._best(logits, *self._of_greedy(len(logits))), settings))
        keys, temperatures = noise.keys(draws.positions), settings.arrays["temperatures"]
        if not settings.filtered:
            return Draw(self._forced(self._best(logits, temperatures, keys), settings))
        rows = settings.arrays["filtered"]
        are_all = len(rows) == len(logits)
        filtered = Filtered(
            rows=rows,
            logits=logits if are_all else logits.index_select(0, rows),
            temperatures=settings.arrays["filtered_temperatures"],
            keys=keys if are_all else keys.index_select(0, rows),
            filters=settings.arrays["filters"],
            num_candidates=settings.num_candidates,
            needs_mass=settings.needs_mass,
        )
        drawn = self._draw_among(filtered)
        if are_all:
            numbers = drawn.flatten()
        else:
            others = self._forced(self._best(logits, temperatures, keys), settings)
            numbers = torch.cat((others.index_copy_(0, rows, drawn[0]), drawn[1]))
        if settings.num_candidates == self.largest_shard:  # all there are
            return Draw(numbers[: len(logits)])
        return Draw(numbers, filtered)

    def redraw(self, draw: Draw, complete: Sequence[bool]) -> Tensor:
        """A draw's token ids, made final. complete: what the draw says, which every rank of `tp` knows alike."""
        assert draw.filtered is not None
        token_ids = draw.token_ids.clone()
        short = [row for row, is_complete in enumerate(complete) if not is_complete]
        for first in range(0, len(short), _REDRAWN_AT_ONCE):
            index = torch.tensor(short[first : first + _REDRAWN_AT_ONCE], device=self.device)
            filtered = draw.filtered.select(index)
            drawn = self._draw_among(filtered)
            while not drawn[1].all():
                count = min(4 * filtered.num_candidates, self.largest_shard)
                filtered = replace(filtered, num_candidates=count)
                drawn = self._draw_among(filtered)
            token_ids.index_copy_(0, filtered.rows, drawn[0])
        return token_ids

    def _best(self, logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
        """The token id of the best score over all shards [num_rows]; ties to the lowest."""
        value, token_id = self.sample_shard(logits, temperatures, keys, self.start)
        if self.tp.size == 1:
            return token_id
        gathered = self.tp.all_gather(torch.stack((value.double(), token_id.double())))  # float64 holds both exactly
        winner = gathered[:, 0].argmax(dim=0, keepdim=True)  # [tp, 2, num_rows], shards in the order of their ids
        return gathered[:, 1].gather(0, winner).squeeze(0).long()

    def _forced(self, token_ids: Tensor, settings: Settings) -> Tensor:
        """With those that are given, in their rows."""
        if not settings.forces:
            return token_ids
        forced = settings.arrays["forced"]
        return torch.where(forced < 0, token_ids, forced)

    def _of_greedy(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Temperatures and keys."""
        temperatures, keys = self._zeros
        if len(temperatures) < num_rows:
            self._zeros = temperatures, keys = temperatures.new_zeros(num_rows), keys.new_zeros(num_rows, 2)
        return temperatures[:num_rows], keys[:num_rows]

    def _draw_among(self, filtered: Filtered) -> Tensor:
        """Token ids, and whether all that may be drawn were among the candidates [2, num_filtered]."""
        values, token_ids, limits = self._candidates(filtered)
        return self.draw_filtered(values, token_ids, limits, filtered.filters, filtered.keys)

    def _candidates(self, filtered: Filtered) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest tokens of all shards, `num_candidates` or fewer from each, descending: values and token ids
        [num_rows, n], and the limits of `eager_sample.draw_filtered`."""
        logits, count = filtered.logits, filtered.num_candidates
        size = min(count, logits.shape[1])
        values, index, limits = self.likeliest(logits, filtered.temperatures, size, filtered.needs_mass)
        if self.tp.size == 1:
            return values, index, limits
        filler = torch.full((len(logits), count - size), _NEVER, dtype=torch.float64, device=self.device)
        packed = torch.cat(
            (values.double(), filler, index.double() + self.start, torch.zeros_like(filler), limits), dim=-1
        )
        gathered = self.tp.all_gather(packed)  # [tp, num_rows, 2 * count + 2]
        by_row = gathered.transpose(0, 1)
        all_values = by_row[:, :, :count].reshape(len(logits), -1).float()
        all_ids = by_row[:, :, count : 2 * count].reshape(len(logits), -1)
        all_values, order = all_values.sort(dim=-1, descending=True, stable=True)
        limits = torch.stack((gathered[:, :, -2].logsumexp(dim=0), gathered[:, :, -1].amax(dim=0)), dim=1)
        return all_values, all_ids.gather(1, order).long(), limits
