"""Beam search for one request: which continuations its beams go on with, which are kept as ended. Torch is not needed.

The beams of a search have equally many tokens. Once the likeliest continuations of all of them are known, the best are
taken together, and best first each of them ends or becomes one of the next beams:

    beams (2)      likeliest continuations, the best 4 of all
    a   -1.0       a x  -1.3   goes on            next beams: a x, b y
    b   -1.1       a .  -1.6   ends               found:      a .  with the score -1.6 / 2 ** length_penalty
                   b y  -1.7   goes on
                   b .  -1.9   not among the best 2: neither found nor followed

What a beam is compared by while it goes on is the sum of its tokens' log-probabilities, after penalties and bans; what
an ended one is ranked by is its score, that sum divided by its output's length to the power of the length penalty. As
in transformers' `generate`, both are float32, and these decide alike where scores are close.

A token of probability zero continues no beam, so that there may be fewer beams, and fewer outputs, than asked for.
"""

import math
from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from ..config import SamplingParams
from .detokenizer import Detokenizer
from .sequence import Sequence


@dataclass(frozen=True, eq=False)
class Beam:
    """A sequence that the search follows."""

    sequence: Sequence
    logprob: np.float32  # the sum of its output's
    detokenizer: Detokenizer | None  # only if stop strings are looked for


@dataclass(frozen=True)
class Continuation:
    """A beam with one more token."""

    beam: int
    token_id: int
    logprob: np.float32
    detokenizer: Detokenizer | None = None


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A sequence that has ended, and might be an output."""

    sequence: Sequence  # never scheduled
    logprob: float
    score: np.float32
    detokenizer: Detokenizer | None


def num_candidates(num_beams: int, num_stop_tokens: int) -> int:
    """How many continuations are looked at: so many that num_beams of them go on, though others end by a token."""
    return max(2, 1 + num_stop_tokens) * num_beams


class BeamSearch:
    """root: the sequence that has the prompt only; params: settled; new_detokenizer: for a new output's text."""

    def __init__(
        self, root: Sequence, params: SamplingParams, new_detokenizer: Callable[[], Detokenizer | None]
    ) -> None:
        assert params.length_penalty is not None and params.early_stopping is not None
        self.num_beams, self.num_outputs = params.num_beams, params.n
        self.length_penalty, self.early_stopping = params.length_penalty, params.early_stopping
        self.found: list[Hypothesis] = []  # best first, num_beams at most
        self._new_detokenizer = new_detokenizer
        self.beams = [Beam(root, np.float32(0), new_detokenizer() if params.stop else None)]  # best first

    @property
    def sequences(self) -> list[Sequence]:
        """Those of its beams."""
        return [beam.sequence for beam in self.beams]

    @property
    def is_ready(self) -> bool:
        """Whether all of its beams have their continuations."""
        return all(beam.sequence.is_held for beam in self.beams)

    def choose(self) -> list[Continuation]:
        """What the beams go on with, best first; nothing if the search has ended. Called when it is ready."""
        length = self.beams[0].sequence.num_output_tokens + 1
        go_on: list[Continuation] = []
        for place, continuation in enumerate(self._likeliest()):
            continuation, reason = self._look_at(continuation)
            if reason is None:
                go_on.append(continuation)
            elif place < self.num_beams:
                self._keep(continuation, reason)
        go_on = go_on[: self.num_beams]
        if not go_on and not self.found:
            self.give_up("error", f"num_beams={self.num_beams}: no token is allowed to come next")
        return go_on if go_on and self._may_improve(go_on[0], length) else []

    def follow(self, continuations: Seq[Continuation], sequences: Seq[Sequence]) -> None:
        """Its beams are now the continuations that were chosen, as these sequences."""
        pairs = zip(continuations, sequences, strict=True)
        self.beams = [Beam(sequence, chosen.logprob, chosen.detokenizer) for chosen, sequence in pairs]

    def give_up(self, reason: str, error: str | None = None) -> None:
        """Its outputs are the beams as they are, instead of what was found."""
        self.found = []
        for beam in self.beams:
            sequence = beam.sequence.fork()
            sequence.end(reason, error)
            self.found.append(Hypothesis(sequence, float(beam.logprob), np.float32(np.nan), beam.detokenizer))

    def outputs(self) -> list[Hypothesis]:
        """The best of what was found, each with its text."""
        return [self._with_text(hypothesis) for hypothesis in self.found[: self.num_outputs]]

    def _likeliest(self) -> list[Continuation]:
        """As many as are looked at, best first; of equals the better beam's, then the lower id."""
        found = []
        for index, beam in enumerate(self.beams):
            told = beam.sequence.candidates
            assert told is not None
            pairs = zip(told.top_ids, told.top_logprobs, strict=True)
            found += [Continuation(index, i, beam.logprob + np.float32(p)) for i, p in pairs if p > -math.inf]
        found.sort(key=lambda continuation: -continuation.logprob)
        return found[: self.beams[0].sequence.num_candidates]

    def _look_at(self, continuation: Continuation) -> tuple[Continuation, str | None]:
        """The continuation with its text, if that is looked at; and why it ends, if it does."""
        beam = self.beams[continuation.beam]
        sequence, length, stops = beam.sequence, beam.sequence.num_output_tokens + 1, False
        if beam.detokenizer is not None:
            detokenizer = beam.detokenizer.fork()
            stops = detokenizer.append(continuation.token_id, look_for_stop=length >= sequence.min_tokens)
            continuation = Continuation(continuation.beam, continuation.token_id, continuation.logprob, detokenizer)
        if stops or (length >= sequence.min_tokens and continuation.token_id in sequence.stop_token_ids):
            return continuation, "stop"
        return continuation, "length" if length >= sequence.max_tokens else None

    def _keep(self, continuation: Continuation, reason: str) -> None:
        """Among what was found, if it is good enough."""
        sequence = self.beams[continuation.beam].sequence.fork()
        sequence.token_ids.append(continuation.token_id)
        sequence.end(reason)
        score = self._score(continuation.logprob, sequence.num_output_tokens)
        hypothesis = Hypothesis(sequence, float(continuation.logprob), score, continuation.detokenizer)
        insort(self.found, hypothesis, key=lambda hypothesis: -hypothesis.score)
        del self.found[self.num_beams :]

    def _may_improve(self, best: Continuation, length: int) -> bool:
        """Whether what goes on may become better than what was found; a guess, unless early_stopping is "never"."""
        if len(self.found) < self.num_beams:
            return True
        if self.early_stopping is True:
            return False
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.beams[best.beam].sequence.max_tokens
        return bool(self._score(best.logprob, length) > self.found[-1].score)

    def _score(self, logprob: np.float32, length: int) -> np.float32:
        with np.errstate(all="ignore"):  # of a penalty beyond all measure
            return np.float32(logprob / np.float32(np.float64(length) ** self.length_penalty))

    def _with_text(self, hypothesis: Hypothesis) -> Hypothesis:
        sequence, detokenizer = hypothesis.sequence, hypothesis.detokenizer
        if detokenizer is None:
            detokenizer = self._new_detokenizer()
            if detokenizer is not None:
                for token_id in sequence.output_token_ids:
                    detokenizer.append(token_id, look_for_stop=False)
        if detokenizer is not None:
            detokenizer.finish()
        return Hypothesis(sequence, hypothesis.logprob, hypothesis.score, detokenizer)
