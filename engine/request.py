"""A request on its way: its sequences and their texts, its times, what it gives; plain Python, no torch."""

import time
from dataclasses import dataclass, field
from typing import Any

from ..config import SamplingParams
from .beam_search import BeamSearch, num_candidates
from .detokenizer import Detokenizer
from .output import CompletionOutput, RequestOutput, RequestTimings, part, settle, snapshot
from .prompts import PreparedRequest
from .sequence import SampleSpec, Sequence


@dataclass(eq=False, slots=True)
class Completion:
    """One of a request's outputs on its way: its sequence, its text."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    beam_logprob: float | None = None  # of a beam: the sum of its tokens', after penalties and bans
    num_emitted: int = 0  # characters of text that went out

    def output(self, index: int, tells: bool) -> CompletionOutput:
        """A snapshot, with what is new since the last one. tells: with log-probabilities."""
        sequence, text = self.sequence, self.detokenizer.text if self.detokenizer else ""
        delta, self.num_emitted = text[self.num_emitted :], len(text)
        output = snapshot(
            CompletionOutput,
            index=index,
            text=text,
            _token_ids=(part, sequence.token_ids, sequence.num_prompt_tokens, sequence.num_tokens),
            finish_reason=sequence.finish_reason,
            stop_reason=self.stop_reason if sequence.finish_reason == "stop" else None,
            delta=delta,
            logprobs=tuple(sequence.scores) if tells else None,
            cumulative_logprob=self.cumulative_logprob if tells else self.beam_logprob,
            error=sequence.error,
        )
        if output.finish_reason is not None:
            settle(output)
        return output

    @property
    def cumulative_logprob(self) -> float:
        return sum(score.logprob for score in self.sequence.scores)

    @property
    def stop_reason(self) -> str | int | None:
        """With what a sequence ended that was stopped."""
        sequence = self.sequence
        if self.detokenizer is not None and self.detokenizer.stopped_by is not None:
            return self.detokenizer.stopped_by
        last = sequence.token_ids[-1]
        return last if last in sequence.stop_token_ids and last not in sequence.eos_token_ids else None


@dataclass(eq=False, slots=True)
class Request:
    """A request on its way: its completions, its times."""

    request_id: str
    index: int  # its place among the prompts that it came with
    prompt: str | None  # its text, if it was given as text
    params: SamplingParams
    first: Sequence
    completions: list[Completion]
    arrival_s: float
    search: BeamSearch | None = None  # until its completions are found
    prompt_token_ids: tuple[int, ...] = field(init=False)
    replica: int = 0
    scheduled_s: float | None = None
    token_s: list[float] = field(default_factory=list)  # from the arrival until each token of the first completion

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.first.token_ids[: self.first.num_prompt_tokens])

    @property
    def ended(self) -> bool:
        return self.search is None and None not in [c.sequence.finish_reason for c in self.completions]

    @property
    def timings(self) -> RequestTimings:
        function, *args = self._timings_now
        timings: RequestTimings = function(*args)
        return timings

    @property
    def _timings_now(self) -> tuple[Any, ...]:
        """What makes them, of what does not keep the request."""
        return _timings, self.arrival_s, self.scheduled_s, time.monotonic(), self.token_s, len(self.token_s)

    def output(self) -> RequestOutput:
        """A snapshot, with what is new since the last one."""
        first, params, num_drafted, num_accepted = self.first, self.params, 0, 0
        for completion in self.completions:
            num_drafted += completion.sequence.num_drafted
            num_accepted += completion.sequence.num_accepted
        output = snapshot(
            RequestOutput,
            request_id=self.request_id,
            index=self.index,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            num_cached_tokens=first.num_cached_tokens or 0,
            outputs=self._outputs(),
            finished=self.ended,
            _timings=self._timings_now,
            prompt_logprobs=None if params.prompt_logprobs is None else (None, *first.prompt_scores),
            pooled=tuple(first.pooled_parts),
            num_drafted=num_drafted,
            num_accepted=num_accepted,
        )
        if output.finished:  # it may be kept for long, and the request is not
            settle(output)
        return output

    def _outputs(self) -> tuple[CompletionOutput, ...]:
        params, chosen = self.params, self.completions
        if self.search is not None or (len(chosen) > params.n and not self.ended):
            return tuple(CompletionOutput(i, "", (), None) for i in range(params.n))  # the best are known in the end
        if len(chosen) > params.n:
            chosen = sorted(chosen, key=lambda c: (c.sequence.error is not None, -c.cumulative_logprob))[: params.n]
        tells = params.logprobs is not None
        return tuple([completion.output(i, tells) for i, completion in enumerate(chosen)])


def _timings(
    arrival_s: float, scheduled_s: float | None, now_s: float, token_s: list[float], num_tokens: int
) -> RequestTimings:
    """As they were at `now_s`, with so many tokens of the first completion."""
    return RequestTimings(
        queue_s=None if scheduled_s is None else scheduled_s - arrival_s,
        ttft_s=token_s[0] if num_tokens else None,
        total_s=now_s - arrival_s,
        token_s=part(token_s, 0, num_tokens),
    )


_SIBLING_SEED = 0x9FB21C651E98DF25  # odd: n samples have n seeds


def sequences_of(request_id: str, prepared: PreparedRequest, seed: int) -> list[Sequence]:
    """One for each of a request's samples; the others are siblings of the first, whose noise is that of n=1.

    One for a beam search, with which its beams begin.
    """
    params = prepared.params
    eos = frozenset(() if params.ignore_eos else params.eos_token_ids or ())
    stops, forced = eos | frozenset(params.stop_token_ids), tuple(params.forced_token_ids or ())
    count = 1 if params.num_beams > 1 else max(params.n, params.best_of or 1)

    def sequence(number: int, siblings: list[Sequence]) -> Sequence:
        assert params.temperature is not None and params.top_k is not None
        assert params.top_p is not None and params.min_p is not None
        own_seed = (seed + number * _SIBLING_SEED) % 2**63  # one that a request may have
        is_ranked = count > params.n
        return Sequence(
            request_id,
            list(prepared.token_ids),
            max_tokens=prepared.max_tokens,
            min_tokens=max(params.min_tokens, len(forced)),  # what is forced is followed, whatever it is
            stop_token_ids=stops,
            eos_token_ids=eos,
            sample=SampleSpec(params.temperature, params.top_k, params.top_p, params.min_p, own_seed),
            logits=None if prepared.logits.is_neutral else prepared.logits,
            logprobs=0 if params.logprobs is None and is_ranked else params.logprobs,
            prompt_logprobs=None if number else params.prompt_logprobs,
            forced=forced,
            num_candidates=num_candidates(params.num_beams, len(stops)) if params.num_beams > 1 else 0,
            num_beams_to_come=params.num_beams - 1,
            priority=params.priority,
            is_pooled=prepared.is_pooled,
            num_asked=prepared.num_unasked,
            siblings=siblings,
        )

    siblings = [sequence(number, []) for number in range(1, count)]
    return [sequence(0, siblings), *siblings]
