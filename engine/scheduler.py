"""Which sequences take part in the next step, with how many tokens: plain Python, no torch.

There is no prefill phase and no decode phase. A sequence has tokens that are not computed yet, a step computes some
of them under a token budget, and a sequence that has caught up draws its next token. A long prompt takes several
steps, a prefix hit starts further along, a preempted sequence starts over: one mechanism.

With a pipeline, up to `num_stages` steps are in flight on disjoint sequences. So that no stage idles, one step takes
a `num_stages`-th of the pending tokens, in whole sequences.

With `look_ahead` (one stage only) two steps are in flight, on the same sequences: the second takes the tokens that the
first one draws, which the ranks know by then and the scheduler does not.

    step n       computes x1 x2 x3, draws x4
    step n + 1   computes x4, given as "the first token that the step before drew", draws x5
    update(n)    x4 turns out to end the sequence: it is finished now, x5 is dropped when n + 1 is back
"""

from array import array
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from .block_manager import BlockManager
from .sequence import Sequence, SequenceStatus
from .step import SampleRequest, StepInput, drawn_before

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class ScheduledStep:
    """A step and the sequences in it, in the step's order."""

    input: StepInput
    sequences: tuple[Sequence, ...]


class Scheduler:
    """Admits, preempts and finishes the sequences of one replica."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_stages: int = 1,
        look_ahead: bool = False,
    ) -> None:
        assert num_stages == 1 or not look_ahead
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.num_stages, self.look_ahead = num_stages, look_ahead
        self.max_in_flight = 2 if look_ahead else num_stages  # steps
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.ended_in_flight: list[Sequence] = []  # finished from outside; their blocks are still being written
        self.num_preemptions = 0
        self.num_pending_tokens = 0  # before every sequence has caught up
        self.num_matched_tokens = 0  # of these, found in the cache when a sequence that still waits was queued
        self.num_expected_tokens = 0  # to come after these
        self._next_step = 0
        self._drawing: dict[Sequence, int] = {}  # sequence -> which of the last step's samples is its own

    @property
    def work(self) -> int:
        """Tokens that are to be computed, as far as can be told now."""
        return self.num_pending_tokens - self.num_matched_tokens + self.num_expected_tokens

    def num_cached(self, token_ids: Seq[int]) -> int:
        """How many of a prompt's first tokens are in the cache now."""
        return len(self.blocks.match(token_ids)) * self.blocks.block_size

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        sequence.num_matched_tokens = self.num_cached(sequence.token_ids)
        self.num_pending_tokens += sequence.num_pending_tokens
        self.num_matched_tokens += sequence.num_matched_tokens
        self.num_expected_tokens += sequence.num_expected_tokens

    # ---- a step's way out ---------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None where there is nothing to do that is not in flight already."""
        chosen: dict[Sequence, int] = {}  # sequence -> new tokens
        budget = self.max_num_batched_tokens
        # In flight counts as pending until it is back.
        share = -(-self.num_pending_tokens // self.num_stages) if self.num_stages > 1 else budget
        short_of_blocks = False

        for sequence in list(self.running):
            if not budget or self.max_num_batched_tokens - budget >= share:
                break
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            count = min(self._num_schedulable(sequence), budget)
            if not count:
                continue
            if not self._make_room(sequence, sequence.num_scheduled_tokens + count, chosen):
                short_of_blocks = True
                continue
            budget -= self._take(sequence, count, chosen)

        while self.waiting and not short_of_blocks and len(self.running) < self.max_num_seqs:
            if not budget or self.max_num_batched_tokens - budget >= share:
                break
            sequence = self.waiting[0]
            prefix = self.blocks.match(sequence.token_ids)
            # A spare block for each running sequence: else the next one to grow would push this one out again.
            if not self.blocks.can_admit(sequence, prefix, spare=len(self.running)):
                break
            self.waiting.popleft()
            self.blocks.admit(sequence, prefix)
            self.num_pending_tokens -= sequence.num_computed_tokens
            self._forget_match(sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            sequence.move_to(SequenceStatus.RUNNING)
            self.running.append(sequence)
            budget -= self._take(sequence, min(sequence.num_pending_tokens, budget), chosen)

        return self._step(chosen) if chosen else None

    def _num_schedulable(self, sequence: Sequence) -> int:
        """Tokens that a step can compute now: those that are known and in no step, or the one that is being drawn."""
        if not sequence.num_in_flight:
            return sequence.num_pending_tokens
        if not self.look_ahead:
            return 0
        if sequence.num_draws_in_flight:
            goes_on = sequence.num_output_tokens + 1 < sequence.max_tokens
            return int(goes_on and sequence.num_scheduled_tokens == sequence.num_tokens)
        return sequence.num_tokens - sequence.num_scheduled_tokens

    def _forget_match(self, sequence: Sequence) -> None:
        self.num_matched_tokens -= sequence.num_matched_tokens
        sequence.num_matched_tokens = 0

    def _take(self, sequence: Sequence, count: int, chosen: dict[Sequence, int]) -> int:
        self.blocks.extend(sequence, sequence.num_scheduled_tokens + count)
        sequence.num_in_flight += count
        chosen[sequence] = count
        return count

    def _make_room(self, sequence: Sequence, num_tokens: int, chosen: dict[Sequence, int]) -> bool:
        """Preempts the latest admitted until the sequence's tokens fit; False if it must give way itself, or wait."""
        while not self.blocks.can_extend(sequence, num_tokens):
            victim = next((s for s in reversed(self.running) if not s.num_in_flight and s not in chosen), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, its tokens to be computed again."""
        self.num_pending_tokens += sequence.num_computed_tokens
        self.blocks.free(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        sequence.move_to(SequenceStatus.WAITING)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)

    def _step(self, chosen: dict[Sequence, int]) -> ScheduledStep:
        token_ids: array[int] = array("q")
        tables: list[array[int]] = []
        samples: list[SampleRequest] = []
        drawing: dict[Sequence, int] = {}
        for index, (sequence, count) in enumerate(chosen.items()):
            stop = sequence.num_scheduled_tokens
            known = sequence.token_ids[stop - count : stop]
            token_ids.extend(known or [drawn_before(self._drawing[sequence])])
            tables.append(array("i", sequence.block_table))
            if stop >= sequence.num_tokens:
                drawing[sequence] = len(samples)
                samples.append(_sample_request(index, sequence, stop))
                sequence.num_draws_in_flight += 1
        self._drawing = drawing
        self._next_step += 1
        step = StepInput(
            step_id=self._next_step,
            token_ids=token_ids,
            query_lens=tuple(chosen.values()),
            context_lens=tuple(sequence.num_scheduled_tokens - count for sequence, count in chosen.items()),
            block_tables=tuple(tables),
            samples=tuple(samples),
        )
        return ScheduledStep(step, tuple(chosen))

    # ---- and back -----------------------------------------------------------------------------------------------

    def update(self, step: ScheduledStep, token_ids: tuple[int, ...]) -> list[Sequence]:
        """Takes a step's drawn tokens; gives the sequences that grew by one, some of them finished by it."""
        assert len(token_ids) == len(step.input.samples)
        for sequence, count in zip(step.sequences, step.input.query_lens, strict=True):
            sequence.num_in_flight -= count
            if sequence.status is SequenceStatus.FINISHED:
                if not sequence.num_in_flight:
                    self.ended_in_flight.remove(sequence)
                    self.blocks.free(sequence)
                continue
            sequence.num_computed_tokens += count
            self.num_pending_tokens -= count
            self.blocks.commit(sequence)
        grown = []
        for sample, token_id in zip(step.input.samples, token_ids, strict=True):
            sequence = step.sequences[sample.sequence]
            sequence.num_draws_in_flight -= 1
            if sequence.status is SequenceStatus.FINISHED:
                continue
            self.num_expected_tokens -= sequence.num_expected_tokens
            sequence.token_ids.append(token_id)
            self.num_expected_tokens += sequence.num_expected_tokens
            self.num_pending_tokens += 1
            grown.append(sequence)
            reason = sequence.finish_reason_now()
            if reason is not None:
                self.finish(sequence, reason)
        return grown

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence, whatever it is doing; nothing if it has ended. Its blocks are freed once no step has it."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        (self.waiting if sequence.status is SequenceStatus.WAITING else self.running).remove(sequence)
        self.num_pending_tokens -= sequence.num_pending_tokens
        self.num_expected_tokens -= sequence.num_expected_tokens
        self._forget_match(sequence)
        sequence.move_to(SequenceStatus.FINISHED)
        sequence.finish_reason = reason
        if sequence.num_in_flight:
            self.ended_in_flight.append(sequence)
        else:
            self.blocks.free(sequence)

    def check(self) -> None:
        """Proves the bookkeeping whole. Raises AssertionError."""
        assert all(s.status is SequenceStatus.WAITING and not s.block_table for s in self.waiting)
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.FINISHED and s.num_in_flight for s in self.ended_in_flight)
        unended = [*self.waiting, *self.running]
        assert self.num_pending_tokens == sum(s.num_pending_tokens for s in unended)
        assert self.num_expected_tokens == sum(s.num_expected_tokens for s in unended)
        assert self.num_matched_tokens == sum(s.num_matched_tokens for s in self.waiting)
        assert not any(s.num_matched_tokens for s in [*self.running, *self.ended_in_flight])
        self.blocks.check([*self.waiting, *self.running, *self.ended_in_flight])


def _sample_request(index: int, sequence: Sequence, position: int) -> SampleRequest:
    """The draw of the token at `position`, for the sequence at `index` in the step."""
    sample = sequence.sample
    return SampleRequest(
        sequence=index,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        min_p=sample.min_p,
        key=noise_key(sample.seed, position) if sample.temperature else (0, 0),
        banned=tuple(sequence.stop_token_ids) if position - sequence.num_prompt_tokens < sequence.min_tokens else (),
    )


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two int32 words for the noise of one position: splitmix64 (Steele et al. 2014), the position its counter."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    return (z & 0xFFFFFFFF) - (1 << 31), (z >> 32) - (1 << 31)
