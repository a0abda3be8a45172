"""What the last stage makes of its hidden states: tokens, and what else was asked for beside them.

logits --- copy of rows that are told of
   |       specs of the requests (`logits_rules.py`), grammars' masks, users' processors
token ids (`sampler.py`)
   |       log-probabilities of these and of the likeliest, in the copy (`logprobs.py`)
numbers    on their way to the host
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import Ops
from ..mesh.collectives import Communicator
from ..shardformer.shard import Range
from .histories import Histories, HistoryWrites
from .logits_rules import LogitsPlan, LogitsRules
from .logprobs import Logprobs
from .sampler import Draw, Draws, Sampler
from .staging import Shapes
from .step import GivenRows, SampleRequest, SampleSettings, StepInput, StepOutput, TokenLogprobs

Head = Callable[[Tensor], Tensor]
"""Hidden states [num_rows, hidden] to this rank's logits [num_rows, local_vocab], float32 or the model's dtype."""

Norm = Callable[[Tensor], Tensor]
"""Hidden states [num_rows, hidden] to the model's last ones."""

_NONE_LEFT = "no token is left to be drawn: what allowed_token_ids or structured_outputs allow, other settings ban"


@dataclass(frozen=True)
class Told:
    """Samples whose log-probabilities are asked for, so many of the likeliest of each."""

    samples: list[int]
    top: int


@dataclass(frozen=True)
class DrawingPlan:
    """What a step draws, still on the host; made by `Drawing.plan`."""

    step: StepInput
    draws: Draws
    histories: HistoryWrites
    rules: LogitsPlan
    told: tuple[Told, ...]
    beams: list[int]  # samples that tell of continuations and draw nothing
    limited: list[int]  # samples of which only some tokens are allowed, and these perhaps banned by other settings

    @property
    def _given(self) -> Sequence[GivenRows]:
        return self.step.given

    @property
    def shapes(self) -> Shapes:
        shapes = {**self.draws.shapes, **self.histories.shapes, **self.rules.shapes}
        if self.step.samples and not self.step.draws_after_all:
            shapes["rows"] = (torch.int64, (len(self.step.samples),))  # of the tokens after which one is drawn
        for number, told in enumerate(self.told):
            shapes[f"told_{number}"] = (torch.int64, (len(told.samples),))
        if self.beams:
            shapes["beams"] = (torch.int64, (len(self.beams),))
        if self.limited:
            shapes["limited"] = (torch.int64, (len(self.limited),))
        if self.step.masks is not None:
            num_masked = len(self.step.masks.samples)
            shapes["masked"] = (torch.int64, (num_masked,))
            shapes["masks"] = (torch.int32, (num_masked, len(self.step.masks.words) // 4 // num_masked))
        if self._given:
            shapes["given_targets"] = (torch.int64, (sum(len(given.targets) for given in self._given),))
        return shapes

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        self.draws.write(host)
        self.histories.write(host)
        self.rules.write(host)
        if "rows" in host:
            host["rows"][:] = [sample.row for sample in self.step.samples]
        for number, told in enumerate(self.told):
            host[f"told_{number}"][:] = told.samples
        if self.beams:
            host["beams"][:] = self.beams
        if self.limited:
            host["limited"][:] = self.limited
        if self.step.masks is not None:
            host["masked"][:] = self.step.masks.samples
            host["masks"].reshape(-1)[:] = np.frombuffer(self.step.masks.words, np.int32)
        if self._given:
            host["given_targets"][:] = np.concatenate([np.frombuffer(g.targets, np.int64) for g in self._given])


@dataclass
class Drawn:
    """What a step drew, on the device."""

    draw: Draw
    plan: DrawingPlan
    raw: list[Tensor] = field(default_factory=list)  # logits of each `Told`, float32 [n, local_vocab]
    rows: list[Tensor] = field(default_factory=list)  # its samples, int64 [n]
    beams: Tensor | None = None  # ids of the likeliest tokens, then their scores: float64 [num_beams, 2 * top]
    given: list[Tensor] = field(default_factory=list)  # of each `GivenRows`, as `Logprobs` gives it
    pooled: list[Tensor] = field(default_factory=list)  # of each `PooledRows`, float32 [hidden]
    best: Tensor | None = None  # float32 [n], of each of `DrawingPlan.limited` the highest logit
    errors: list[tuple[int, str]] = field(default_factory=list)  # samples whose processors failed, and why
    told: list[Tensor] = field(default_factory=list)  # of each `Told`, as `Logprobs` gives it

    @property
    def numbers(self) -> list[Tensor]:
        """What is to come to the host: token ids first."""
        beams = [] if self.beams is None else [self.beams]
        best = [] if self.best is None else [self.best]
        return [self.draw.numbers, *self.told, *beams, *self.given, *self.pooled, *best]


class Drawing:
    """The last stage's end of every step, over one vocabulary shard, with the other ranks of `tp`; of both models'.

    vocabulary: each rank's (start, stop); num_slots, longest: of histories, and tokens of one.
    """

    unsettled: Callable[[], None] | None = None
    """Makes the last step's draw final, if it may have to be mended."""

    def __init__(
        self,
        tp: Communicator,
        vocabulary: Sequence[Range],
        ops: Ops,
        device: torch.device,
        num_slots: int,
        longest: int,
    ) -> None:
        self.tp = tp
        self.sampler = Sampler(tp, vocabulary, ops, device)
        self.histories = Histories(num_slots, longest, device)
        self.rules = LogitsRules(tp, vocabulary, self.histories)
        self.logprobs = Logprobs(tp, vocabulary)
        self.vocab_size, self._start = vocabulary[-1][1], vocabulary[tp.rank][0]
        self._apply_bitmask = ops.apply_bitmask

    def plan(self, step: StepInput) -> DrawingPlan:
        """Called step by step, in their order."""
        samples = step.samples
        histories, draws = self.histories.plan(step.histories), self.sampler.plan(samples)
        if draws.settings.are_plain:
            return DrawingPlan(step, draws, histories, self.rules.plan(()), (), [], [])  # as most steps are
        rules = self.rules.plan([(sample.settings.slot, sample.position) for sample in samples])
        beams = [number for number, sample in enumerate(samples) if sample.settings.num_candidates]
        masked = set(() if step.masks is None else step.masks.samples)
        limited = [n for n, sample in enumerate(samples) if self._is_limited(sample.settings, n in masked)]
        return DrawingPlan(step, draws, histories, rules, self._told(samples), beams, limited)

    def _is_limited(self, settings: SampleSettings, is_masked: bool) -> bool:
        if settings.slot < 0 or settings.forced >= 0 or settings.num_candidates:
            return False
        return is_masked or self.histories.spec(settings.slot).allowed is not None

    def _told(self, samples: Sequence[SampleRequest]) -> tuple[Told, ...]:
        """Those with any number together, for the largest; but those with all tokens, which are sorted, apart."""
        asked = [sample.settings.logprobs for sample in samples]
        some = [n for n, logprobs in enumerate(asked) if logprobs is not None and logprobs >= 0]
        all_of = [n for n, logprobs in enumerate(asked) if logprobs == -1]
        groups = [Told(some, max(asked[n] or 0 for n in some))] if some else []
        return (*groups, *([Told(all_of, self.vocab_size)] if all_of else []))

    def settle(self) -> None:
        if self.unsettled is not None:
            self.unsettled()
            self.unsettled = None

    def begin(self, plan: DrawingPlan, arrays: Mapping[str, Tensor], drawn: Tensor) -> None:
        """Brings histories up to date. drawn: what the step drew that it is ahead of."""
        self.histories.apply(plan.histories, arrays, drawn)

    def __call__(
        self, hidden: Tensor, head: Head, plan: DrawingPlan, arrays: Mapping[str, Tensor], norm: Norm
    ) -> Drawn:
        """hidden: [num_tokens, hidden] of the step, or of its samples, where they are fewer and all that it wants;
        arrays: those of `plan`, on the device."""
        given = self._given(hidden, head, plan, arrays)
        pooled = [norm(hidden[rows.row : rows.stop]).float().sum(dim=0) for rows in plan.step.pooled]
        samples = plan.step.samples
        if not samples:
            return Drawn(
                Draw(torch.empty(0, dtype=torch.int64, device=hidden.device)), plan, given=given, pooled=pooled
            )
        is_picked = plan.step.draws_after_all or len(hidden) < plan.step.num_tokens
        logits = head(hidden if is_picked else hidden.index_select(0, arrays["rows"]))
        if not plan.draws.settings.are_plain or plan.step.masks is not None:
            logits = logits.float()  # to be changed, or told of
        raw = [logits.index_select(0, arrays[f"told_{number}"]) for number in range(len(plan.told))]
        if plan.beams:
            logits.index_copy_(0, arrays["beams"], self.logprobs.normalised(logits.index_select(0, arrays["beams"])))
        self.rules.apply(logits, plan.rules, arrays)
        if plan.step.masks is not None:
            self._apply_bitmask(logits, arrays["masked"], arrays["masks"], self._start)
        errors = self.rules.process(logits, plan.rules)
        best = None
        if plan.limited:
            best = self.tp.all_gather(logits.index_select(0, arrays["limited"]).amax(dim=1)).amax(dim=0)
        beams = None
        if plan.beams:
            most = max(sample.settings.num_candidates for sample in samples)
            beams = self.logprobs.likeliest(logits.index_select(0, arrays["beams"]), most)
        draw = self.sampler(logits, plan.draws, arrays)
        rows = [arrays[f"told_{number}"] for number in range(len(plan.told))]
        drawn = Drawn(draw, plan, raw, rows, beams, given, pooled, best, errors)
        drawn.told = self._tell(drawn)
        return drawn

    def redraw(self, drawn: Drawn, complete: Sequence[bool]) -> Drawn:
        """The same with a draw that is final. complete: as for `Sampler.redraw`."""
        drawn = replace(drawn, draw=Draw(self.sampler.redraw(drawn.draw, complete)))
        drawn.told = self._tell(drawn)
        return drawn

    def _tell(self, drawn: Drawn) -> list[Tensor]:
        parts = zip(drawn.raw, drawn.rows, drawn.plan.told, strict=True)
        return [self.logprobs(raw, drawn.draw.token_ids.index_select(0, rows), told.top) for raw, rows, told in parts]

    def _given(self, hidden: Tensor, head: Head, plan: DrawingPlan, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        found, first = [], 0
        for given in plan.step.given:
            count = len(given.targets)
            rows, targets = hidden[given.row : given.row + count], arrays["given_targets"][first : first + count]
            top = self.vocab_size if given.logprobs < 0 else given.logprobs
            found.append(self.logprobs.of_hidden(rows, head, targets, top))
            first += count
        return found


def output_of(drawn: Drawn, numbers: Sequence[Tensor]) -> StepOutput:
    """numbers: those of `drawn`, on the host, of a draw that is final."""
    plan, rest = drawn.plan, iter(numbers[1:])
    samples, given = plan.step.samples, plan.step.given
    token_ids = tuple(numbers[0].tolist()[: len(samples)])
    logprobs: list[TokenLogprobs | None] = [None] * len(samples)
    for told in plan.told:
        for number, row in zip(told.samples, next(rest).tolist(), strict=True):
            logprobs[number] = _token_logprobs(row, samples[number].settings.logprobs)
    if plan.beams:
        for number, row in zip(plan.beams, next(rest).tolist(), strict=True):
            logprobs[number] = _token_logprobs([0.0, 0.0, *row], samples[number].settings.num_candidates)
    scores = [tuple(_token_logprobs(row, g.logprobs) for row in next(rest).tolist()) for g in given]
    pooled = tuple(next(rest).numpy().tobytes() for _ in plan.step.pooled)
    best = next(rest).tolist() if plan.limited else []
    none_left = [(n, _NONE_LEFT) for n, value in zip(plan.limited, best, strict=True) if value == -inf]
    return StepOutput(
        step_id=plan.step.step_id,
        token_ids=token_ids,
        logprobs=tuple(logprobs) if plan.told or plan.beams else None,
        given=tuple(scores),
        pooled=pooled,
        errors=(*drawn.errors, *none_left),
    )


def _token_logprobs(row: Sequence[float], asked: int | None) -> TokenLogprobs:
    """row: of `Logprobs`, with as many of the likeliest tokens as were asked for or more; -1: all."""
    assert asked is not None
    top = (len(row) - 2) // 2
    count = top if asked < 0 else min(asked, top)
    return TokenLogprobs(
        row[0], int(row[1]), tuple(map(int, row[2 : 2 + count])), tuple(row[2 + top : 2 + top + count])
    )
