"""Applies each row's `LogitsSpec` to its logits, on the last stage, before the sampler draws from them.

Order as in transformers: bias, repetition penalty, then frequency and presence, then whatever bans tokens, among which
there is no order, then users' processors. What no row asks for costs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mesh.collectives import Communicator
from ..shardformer.shard import Range
from . import logits_ops
from .histories import Histories
from .logits_ops import Before
from .logits_spec import LogitsSpec
from .staging import Shapes
from .user_processors import Refused, process

_TOKENS_AT_ONCE = 1 << 20  # of histories: what is computed of each takes about 100 bytes
_DTYPES = {np.int64: torch.int64, np.float32: torch.float32}


@dataclass(frozen=True)
class LocalSpec:
    """What of a spec concerns one shard of the vocabulary: numpy arrays, ids counted from the shard's start."""

    spec: LogitsSpec
    biased: Any  # int64 [n]
    bias: Any  # float32 [n]
    banned: Any  # int64 [n]: always
    banned_first: Any  # int64 [n]: as the first token of the output
    banned_early: Any  # int64 [n]: until min_tokens
    allowed: Any  # int64 [n]; None: all
    prefixes: Any  # int64 [n, width]: of bad words of several ids, on the right, and -1 before them
    prefix_lens: Any  # int64 [n]
    last_ids: Any  # int64 [n]: of these bad words

    @classmethod
    def of(cls, spec: LogitsSpec, start: int, stop: int) -> "LocalSpec":
        def local(token_ids: Iterable[int]) -> Any:
            return np.array(sorted({i - start for i in token_ids if start <= i < stop}), np.int64)

        bias = [(token_id - start, value) for token_id, value in spec.bias if start <= token_id < stop]
        phrases = [word for word in spec.bad_words if len(word) > 1 and start <= word[-1] < stop]
        width = max(map(len, phrases), default=1) - 1
        prefixes = [[-1] * (width + 1 - len(word)) + list(word[:-1]) for word in phrases]
        return cls(
            spec=spec,
            biased=np.array([token_id for token_id, _ in bias], np.int64),
            bias=np.array([value for _, value in bias], np.float32),
            banned=local([*spec.suppressed, *(word[0] for word in spec.bad_words if len(word) == 1)]),
            banned_first=local(spec.begin_suppressed),
            banned_early=local(spec.end_ids if spec.min_tokens else ()),
            allowed=None if spec.allowed is None else local(spec.allowed),
            prefixes=np.array(prefixes, np.int64).reshape(len(phrases), width),
            prefix_lens=np.array([len(word) - 1 for word in phrases], np.int64),
            last_ids=np.array([word[-1] - start for word in phrases], np.int64),
        )


@dataclass(frozen=True)
class RuledRow:
    """A row of logits that has a spec."""

    row: int
    place: int  # of its first logit among all rows' in this shard
    slot: int  # of its sequence in the histories
    length: int  # tokens before the one that is drawn
    local: LocalSpec

    @property
    def spec(self) -> LogitsSpec:
        return self.local.spec


@dataclass(frozen=True)
class Span:
    """Rows whose tokens before are looked at together."""

    first: int  # among the rows that look at tokens before
    stop: int
    num_tokens: int
    longest_ngram: int  # 0: none is asked for


@dataclass(frozen=True)
class LogitsPlan:
    """What a step's rows ask of their logits, still on the host; made by `LogitsRules.plan`."""

    values: Mapping[str, Any]  # numpy arrays
    spans: tuple[Span, ...]
    has_penalties: bool
    has_counts: bool  # frequency or presence penalties
    processed: tuple[RuledRow, ...]  # by users' processors

    @property
    def changes_logits(self) -> bool:
        return bool(self.values or self.processed)

    @property
    def shapes(self) -> Shapes:
        return {name: (_DTYPES[value.dtype.type], value.shape) for name, value in self.values.items()}

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        for name, value in self.values.items():
            host[name][:] = value


_NOTHING = LogitsPlan(values={}, spans=(), has_penalties=False, has_counts=False, processed=())


class LogitsRules:
    """The specs of the histories' slots, on one shard of the vocabulary. vocabulary: each rank's (start, stop)."""

    def __init__(self, tp: Communicator, vocabulary: Sequence[Range], histories: Histories) -> None:
        self.tp, self.vocabulary, self.histories = tp, vocabulary, histories
        self.start, self.stop = vocabulary[tp.rank]
        self._locals: dict[int, LocalSpec] = {}  # by slot

    # ---- on the host ------------------------------------------------------------------------------------------------

    def plan(self, rows: Sequence[tuple[int, int]]) -> LogitsPlan:
        """What rows ask for, once the histories have planned the step's updates. rows: (slot, tokens before) of each
        row of logits; slot -1: without a spec."""
        ruled = [self._ruled(row, slot, length) for row, (slot, length) in enumerate(rows) if slot >= 0]
        if not ruled:
            return _NOTHING
        looking_back = [row for row in ruled if _looks_back(row)]
        return LogitsPlan(
            values={
                **_bias(ruled),
                **_bans(ruled),
                **_allowed(ruled),
                **self._phrases(ruled),
                **self._before(looking_back),
            },
            spans=tuple(_spans(looking_back)),
            has_penalties=any(row.spec.repetition_penalty != 1 or _counts(row.spec) for row in looking_back),
            has_counts=any(_counts(row.spec) for row in looking_back),
            processed=tuple(row for row in ruled if row.spec.processors),
        )

    def _ruled(self, row: int, slot: int, length: int) -> RuledRow:
        spec, local = self.histories.spec(slot), self._locals.get(slot)
        if local is None or local.spec is not spec:
            local = self._locals[slot] = LocalSpec.of(spec, self.start, self.stop)
        return RuledRow(row, row * (self.stop - self.start), slot, length, local)

    def _phrases(self, ruled: Sequence[RuledRow]) -> dict[str, Any]:
        """Bad words of several ids that some row has tokens enough for."""
        ruled = [row for row in ruled if (row.local.prefix_lens <= row.length).any()]
        if not ruled:
            return {}
        fits = np.concatenate([row.local.prefix_lens <= row.length for row in ruled])
        prefixes = np.full((len(fits), max(row.local.prefixes.shape[1] for row in ruled)), -1, np.int64)
        first = 0
        for row in ruled:
            count, width = row.local.prefixes.shape
            prefixes[first : first + count, prefixes.shape[1] - width :] = row.local.prefixes
            first += count
        stops = [np.full(len(row.local.last_ids), row.slot * self.histories.capacity + row.length) for row in ruled]
        places = [row.place + row.local.last_ids for row in ruled]
        return {
            "phrase_prefixes": prefixes[fits],
            "phrase_stops": np.concatenate(stops)[fits],
            "phrase_places": np.concatenate(places)[fits],
        }

    def _before(self, ruled: Sequence[RuledRow]) -> dict[str, Any]:
        """Of rows that look at all tokens before."""
        if not ruled:
            return {}
        capacity, specs = self.histories.capacity, [row.spec for row in ruled]
        integers = [
            [row.slot * capacity for row in ruled],
            [row.length for row in ruled],
            [row.row for row in ruled],
            [spec.num_prompt_tokens for spec in specs],
            [_ngram_size(row) for row in ruled],
        ]
        penalties = [
            [spec.repetition_penalty for spec in specs],
            [spec.frequency_penalty for spec in specs],
            [spec.presence_penalty for spec in specs],
        ]
        return {"before": np.array(integers, np.int64), "penalties": np.array(penalties, np.float32)}

    # ---- on the device ----------------------------------------------------------------------------------------------

    def apply(self, logits: Tensor, plan: LogitsPlan, arrays: Mapping[str, Tensor]) -> None:
        """All but users' processors, in place. logits: float32 [num_rows, local_vocab], contiguous; arrays: those of
        the plan, on the device."""
        if not plan.values:
            return
        flat, histories = logits.view(-1), self.histories.tokens.view(-1)
        if "biased" in arrays:
            logits_ops.add_bias(flat, arrays["biased"], arrays["bias"])
        for span in plan.spans:
            self._look_back(flat, histories, plan, span, arrays)
        if "phrase_places" in arrays:
            logits_ops.ban_completions(
                flat, histories, arrays["phrase_stops"], arrays["phrase_prefixes"], arrays["phrase_places"]
            )
        if "banned_places" in arrays:
            logits_ops.ban(flat, arrays["banned_places"])
        if "allowing" in arrays:
            logits_ops.keep_only(logits, arrays["allowing"], arrays["allowed_places"])

    def _look_back(
        self, flat: Tensor, histories: Tensor, plan: LogitsPlan, span: Span, arrays: Mapping[str, Tensor]
    ) -> None:
        firsts, lengths, rows, num_prompt_tokens, ngram_sizes = arrays["before"][:, span.first : span.stop]
        shard = (self.start, self.stop)
        before = Before.gather(histories, firsts, lengths, rows, span.num_tokens, shard)
        if plan.has_penalties:
            repetition, frequency, presence = arrays["penalties"][:, span.first : span.stop]
            counted = (frequency, presence) if plan.has_counts else None
            logits_ops.penalize(flat, before, num_prompt_tokens, repetition, counted)
        if span.longest_ngram:
            logits_ops.ban_repeated_ngrams(flat, before, ngram_sizes, span.longest_ngram)

    def process(self, logits: Tensor, plan: LogitsPlan) -> list[tuple[int, str]]:
        """Users' processors, in place, once whatever bans tokens is done; waits for the device.

        They are called on the first rank of `tp`, on whole rows. Gives (row, reason in one line) of the rows of which
        one failed, which stay as they were; on other ranks none.
        """
        if not plan.processed:
            return []
        rows = torch.tensor([row.row for row in plan.processed], device=logits.device)
        whole = self._gather(logits.index_select(0, rows))
        failures = []
        if self.tp.rank == 0:
            for place, row in enumerate(plan.processed):
                token_ids = self.histories.tokens[row.slot, : row.length].tolist()
                try:
                    whole[place] = process(row.spec, token_ids, whole[place])
                except Refused as reason:
                    failures.append((row.row, str(reason)))
        self.tp.broadcast(whole, 0)
        logits.index_copy_(0, rows, whole[:, self.start : self.stop])
        return failures

    def _gather(self, local: Tensor) -> Tensor:
        """[num_rows, local_vocab] of each rank to [num_rows, vocab]."""
        sizes = [stop - start for start, stop in self.vocabulary]
        padded = local.new_zeros(len(local), max(sizes))
        padded[:, : local.shape[1]] = local
        gathered = self.tp.all_gather(padded)
        return torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)


def _looks_back(row: RuledRow) -> bool:
    return row.spec.repetition_penalty != 1 or _counts(row.spec) or _ngram_size(row) > 0


def _ngram_size(row: RuledRow) -> int:
    """0 too if so few tokens are there that none of so many can come again."""
    size = row.spec.no_repeat_ngram_size
    return size if size <= row.length else 0


def _counts(spec: LogitsSpec) -> bool:
    return bool(spec.frequency_penalty or spec.presence_penalty)


def _bias(ruled: Sequence[RuledRow]) -> dict[str, Any]:
    biased = [row for row in ruled if len(row.local.biased)]
    if not biased:
        return {}
    return {
        "biased": np.concatenate([row.place + row.local.biased for row in biased]),
        "bias": np.concatenate([row.local.bias for row in biased]),
    }


def _bans(ruled: Sequence[RuledRow]) -> dict[str, Any]:
    """Tokens that are banned whatever came before."""
    banned = []
    for row in ruled:
        local, num_output = row.local, row.length - row.spec.num_prompt_tokens
        banned.append(row.place + local.banned)
        if num_output == 0:
            banned.append(row.place + local.banned_first)
        if num_output < row.spec.min_tokens:
            banned.append(row.place + local.banned_early)
    return {"banned_places": np.concatenate(banned)} if any(map(len, banned)) else {}


def _allowed(ruled: Sequence[RuledRow]) -> dict[str, Any]:
    allowing = [row for row in ruled if row.local.allowed is not None]
    if not allowing:
        return {}
    return {
        "allowing": np.array([row.row for row in allowing], np.int64),
        "allowed_places": np.concatenate([row.place + row.local.allowed for row in allowing]),
    }


def _spans(ruled: Sequence[RuledRow]) -> Iterable[Span]:
    """Runs of rows with so many tokens before that what is computed of them takes little memory."""
    first = 0
    while first < len(ruled):
        stop, num_tokens = first + 1, ruled[first].length
        while stop < len(ruled) and num_tokens + ruled[stop].length <= _TOKENS_AT_ONCE:
            num_tokens += ruled[stop].length
            stop += 1
        longest = max(map(_ngram_size, ruled[first:stop]))
        yield Span(first, stop, num_tokens, longest)
        first = stop
