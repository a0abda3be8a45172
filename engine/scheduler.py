"""Which sequences take part in the next step, with how many tokens: plain Python, no torch.

There is no prefill phase and no decode phase. A sequence has tokens that are not computed yet, a step computes some
of them under a token budget, and a sequence that has caught up draws its next token. A long prompt takes several
steps, a prefix hit starts further along, a preempted sequence starts over: one mechanism.

A sequence that catches up may go on with drafts, tokens that somebody guesses. A token is drawn after each, as if the
others were not there; the drafts stand as far as they are what is drawn, and the rest was in vain. The tokens are those
that single steps would draw, whatever was guessed.

    step         computes x4 and the drafts y5 y6 y7; draws x5 after x4, then z6 z7 z8 after the drafts
    update       x5 = y5, so z6 is x6; x6 != y6, so what comes after it says nothing

Several sequences with one prompt (`Sequence.siblings`) draw their first tokens from one row, and from then on hold the
same blocks.

With a pipeline, up to `num_stages` steps are in flight on disjoint sequences. So that no stage idles, one step takes
a `num_stages`-th of the pending tokens, in whole sequences.

With `look_ahead` one step more is in flight, on sequences that others have: it takes the tokens that one of these
draws, which the ranks know by then and the scheduler does not.

    step n       computes x1 x2 x3, draws x4
    step n + 1   computes x4, given as "the first token that step n drew", draws x5
    update(n)    x4 turns out to end the sequence: it is finished now, x5 is dropped when n + 1 is back

In a pipeline the sequences come first that have waited longest, so that it is the oldest step whose draws are taken:

    first stage  A1  B1  A2  B2  A3 ...    A2 is there when B1 is done; the tokens that A1 drew come from the last stage
    last stage       A1  B1  A2  B2 ...
"""

from array import array
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import groupby

from .block_manager import BlockManager
from .draft_steps import DraftSteps
from .sequence import Sequence, SequenceStatus
from .speculation.speculator import DraftModelSpeculator, Speculator
from .step import MAX_DRAFTS, StepInput, StepOutput, TokenLogprobs, drawn_before
from .step_rows import ScheduledStep, StepRows

_FORCED_AT_ONCE = 32  # tokens of a sequence in one step

Heed = Callable[[Sequence], str | None]
"""Asked after each token that a sequence got: why it ends with this one, or None."""


@dataclass
class Chosen:
    """What a step takes, while it is put together."""

    budget: int  # tokens that it may still take
    share: int  # with so many more it has enough; drafts come on top
    num_behind: int  # sequences that run and are still to be asked, whose own tokens come before anybody's drafts
    latest: int  # the step that it may be ahead of
    ahead_of: int = 0  # the step whose draws it takes, before they are known; one at most
    drafts_left: int = MAX_DRAFTS  # that it may have
    counts: dict[Sequence, int] = field(default_factory=dict)  # sequence -> its tokens
    copies: list[tuple[int, int]] = field(default_factory=list)
    is_short_of_blocks: bool = False  # nobody else is admitted

    @property
    def is_full(self) -> bool:
        return self.budget <= 0 or self.share <= 0


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
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.num_stages, self.look_ahead = num_stages, look_ahead
        self.speculator: Speculator | None = None  # who guesses; None: no sequence has drafts, but those forced on it
        self._draft_steps: DraftSteps | None = None
        self.waiting: list[Sequence] = []  # by priority, then arrival
        self.running: list[Sequence] = []  # in order of admission
        self.ended_in_flight: list[Sequence] = []  # finished from outside; their blocks are still being written
        self.num_preemptions = 0
        self.num_drafted = self.num_accepted = 0
        self.num_pending_tokens = 0  # before every sequence has caught up
        self.num_matched_tokens = 0  # of these, found in the cache when a sequence that still waits was queued
        self.num_expected_tokens = 0  # to come after these
        self._next_step = self._next_order = 0
        # Of each step that may be in flight: its id, and sequence -> which of the step's samples is its own.
        self._drawing: deque[tuple[int, Mapping[Sequence, int]]] = deque(maxlen=num_stages)
        self._free_slots = list(range(max_num_seqs))

    @property
    def work(self) -> int:
        """Tokens that are to be computed, as far as can be told now."""
        return self.num_pending_tokens - self.num_matched_tokens + self.num_expected_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def num_cached(self, sequence: Sequence) -> int:
        """How many of a sequence's first tokens it can take from the cache now."""
        return len(self._match(sequence)) * self.blocks.block_size

    @property
    def max_in_flight(self) -> int:
        """Steps. With guesses, no sequence is scheduled ahead: one step more would only divide the batch."""
        return self.num_stages + int(self.look_ahead and self.speculator is None)

    def speculate(self, speculator: Speculator | None) -> None:
        """Changes who guesses, or lets nobody guess; no step is in flight."""
        assert not any(sequence.is_in_flight for sequence in (*self.running, *self.ended_in_flight))
        self.speculator, self._draft_steps = speculator, None
        if isinstance(speculator, DraftModelSpeculator):
            self._draft_steps = DraftSteps(self.blocks, speculator, self.num_stages, self.max_num_batched_tokens)
        for sequence in self.running:
            sequence.forget_drafted()
            sequence.num_draft_computed = 0
            sequence.num_told_tokens = min(sequence.num_told_tokens, sequence.num_tokens)

    def add(self, sequence: Sequence) -> None:
        self._next_order += 1
        for member in (sequence, *sequence.siblings):
            member.order = self._next_order
        self._wait(sequence)
        sequence.num_matched_tokens = self.num_cached(sequence)
        self.num_matched_tokens += sequence.num_matched_tokens
        self._count(sequence, 1)

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=lambda waiting: (waiting.priority, waiting.order))

    def _count(self, sequence: Sequence, sign: int) -> None:
        """Into or out of the totals."""
        self.num_pending_tokens += sign * sequence.num_pending_tokens
        self.num_expected_tokens += sign * sequence.num_expected_tokens

    # ---- a step's way out ---------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep | None:
        """The next step, or None where there is nothing to do that is not in flight already."""
        if self._draft_steps is not None:
            step = self._draft_steps.schedule(self.running, self._next_step + 1)
            if step is not None:
                self._next_step += 1
                return step
        step = self._schedule(latest=self._next_step + 1 - self.num_stages)
        if step is None and self.max_in_flight > self.num_stages > 1:
            step = self._schedule(latest=self._next_step)  # it will wait, but for no driver
        return step

    def _schedule(self, latest: int) -> ScheduledStep | None:
        """latest: the step that it may be ahead of."""
        budget, pending = self.max_num_batched_tokens, self.num_pending_tokens
        # In flight counts as pending until it is back.
        share = -(-pending // self.num_stages) if self.num_stages > 1 else budget
        chosen = Chosen(budget, share, len(self.running), latest)
        waits = self.look_ahead and self.num_stages > 1
        by_priority = sorted(self.running, key=lambda s: (s.priority, s.last_step if waits else 0))
        for priority, sequences in groupby(by_priority, key=lambda running: running.priority):
            self._admit(chosen, before=priority)
            for sequence in sequences:
                self._go_on(sequence, chosen)
        self._admit(chosen)
        return self._step(chosen) if chosen.counts else None

    def _go_on(self, sequence: Sequence, chosen: "Chosen") -> None:
        """Takes a sequence that was running, if it has something to compute and finds room."""
        chosen.num_behind -= 1
        if chosen.is_full or sequence.status is not SequenceStatus.RUNNING:
            return
        count = min(self._num_schedulable(sequence, chosen), chosen.budget)
        if not count:
            return
        if self._make_room(sequence, sequence.num_scheduled_tokens + count, chosen):
            self._take(sequence, count, chosen)
        else:
            chosen.is_short_of_blocks |= sequence.status is SequenceStatus.RUNNING  # else it gave way itself

    def _admit(self, chosen: "Chosen", before: int | None = None) -> None:
        """Lets waiting sequences run, in their order, as long as there is room. before: only if their priority is."""
        while not chosen.is_full and not chosen.is_short_of_blocks:
            sequence = next((waiting for waiting in self.waiting if not waiting.is_held), None)
            if sequence is None or (before is not None and sequence.priority >= before):
                break
            prefix = self._match(sequence)
            if not self._can_admit(sequence, prefix):
                worst = self._victim(chosen)
                if worst is None or not _gives_way(worst, sequence):
                    chosen.is_short_of_blocks = True
                    break
                self._preempt(worst)
                continue
            self.waiting.remove(sequence)
            self.blocks.admit(sequence, prefix)
            self.num_pending_tokens -= sequence.num_computed_tokens
            self._forget_match(sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = sequence.num_computed_tokens
            self._run(sequence)
            self._take(sequence, min(sequence.num_pending_tokens, chosen.budget), chosen)

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the cache that it begins with."""
        return self.blocks.match(sequence.token_ids)[: sequence.num_reusable_tokens // self.blocks.block_size]

    def _can_admit(self, sequence: Sequence, prefix: Seq[int]) -> bool:
        # A spare block for each other sequence that will grow: else the next to do so would push this one out again.
        # But beams do not grow before those of their group that come back.
        is_back = sequence.num_candidates and sequence.num_output_tokens
        spare = len(self.running) + _num_places(sequence) - 1 if self.running and not is_back else 0
        places = self._num_places + _num_places(sequence)
        return places <= self.max_num_seqs and self.blocks.can_admit(sequence, prefix, spare)

    @property
    def _num_places(self) -> int:
        """Of `max_num_seqs`, those that are taken, or kept for who begins with another's first token."""
        return sum(_num_places(sequence) for sequence in self.running)

    def _run(self, sequence: Sequence) -> None:
        sequence.move_to(SequenceStatus.RUNNING)
        self.running.append(sequence)
        self._open_slot(sequence)
        sequence.forget_drafted()
        sequence.num_draft_computed = 0  # whatever the draft model left in the blocks of a prefix

    def _open_slot(self, sequence: Sequence) -> None:
        if sequence.logits is not None and sequence.slot is None:
            sequence.slot, sequence.num_told_tokens = self._free_slots.pop(), -1

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._close_slot(sequence)

    def _close_slot(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None

    def _num_schedulable(self, sequence: Sequence, chosen: "Chosen") -> int:
        """Tokens that a step can compute now: those that are known and in no step, or the one that is being drawn."""
        if sequence.is_held or sequence.num_drafting:
            return 0
        if not sequence.num_in_flight:
            return sequence.num_pending_tokens
        if not self.look_ahead or sequence.drafts:
            return 0
        if sequence.num_draws_in_flight:
            goes_on = sequence.num_output_tokens + 1 < sequence.max_tokens
            knows = sequence.num_scheduled_tokens == sequence.num_tokens and not self._needs_host(sequence)
            may_be = sequence.last_step <= chosen.latest and chosen.ahead_of in (0, sequence.last_step)
            # Who waits for blocks may be waiting for this one to be in no step.
            return int(goes_on and knows and may_be and not chosen.is_short_of_blocks)
        return sequence.num_tokens - sequence.num_scheduled_tokens

    def _needs_host(self, sequence: Sequence) -> bool:
        """Whether its next step takes what the driver makes of the token before."""
        return sequence.needs_host or self.speculator is not None

    def _forget_match(self, sequence: Sequence) -> None:
        self.num_matched_tokens -= sequence.num_matched_tokens
        sequence.num_matched_tokens = 0

    def _take(self, sequence: Sequence, count: int, chosen: "Chosen") -> None:
        stop = sequence.num_scheduled_tokens + count
        if stop > sequence.num_tokens:
            chosen.ahead_of = sequence.last_step
        if self.speculator is not None or sequence.forced:
            for_drafts = min(chosen.budget - count - chosen.num_behind, chosen.drafts_left)
            sequence.drafts = self._draft(sequence, for_drafts) if stop == sequence.num_tokens else ()
        chosen.share -= count
        chosen.drafts_left -= len(sequence.drafts)
        if self._draft_steps is not None:
            sequence.forget_drafted()
        count += len(sequence.drafts)
        copy = self.blocks.extend(sequence, sequence.num_scheduled_tokens + count)
        if copy is not None:
            chosen.copies.append(copy)
        sequence.num_in_flight += count
        self.blocks.commit(sequence)  # for who comes after it in this step already
        chosen.counts[sequence] = count
        chosen.budget -= count

    def _draft(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Guesses for which there is room: in the budget, in what may come of the output, and in the blocks."""
        most = min(budget, sequence.max_tokens - sequence.num_output_tokens - 1)
        if most <= 0 or sequence.siblings or sequence.num_candidates:
            return ()
        drafts: Seq[int] = sequence.forced[sequence.num_output_tokens :][: min(most, _FORCED_AT_ONCE)]
        if not drafts and self.speculator is not None:
            drafts = self.speculator.propose(sequence, most, -(-len(self.running) // self.num_stages))
        if drafts and sequence.constraint is not None:
            _, num_allowed = sequence.constraint.masks(drafts)
            drafts = drafts[:num_allowed]
        # The others will grow too: a guess is to push nobody out.
        while drafts and not self.blocks.can_extend(sequence, sequence.num_tokens + len(drafts), len(self.running)):
            drafts = drafts[:-1]
        return tuple(drafts)

    def _victim(self, chosen: "Chosen") -> Sequence | None:
        """Who gives way first, of those that are in no step."""
        return _last([s for s in self.running if not s.is_in_flight and s not in chosen.counts])

    def _make_room(self, sequence: Sequence, num_tokens: int, chosen: "Chosen") -> bool:
        """Preempts others until the sequence's tokens fit; False if it gives way itself, or waits for who should."""
        while not self.blocks.can_extend(sequence, num_tokens):
            victim = self._victim(chosen)
            if victim is None or (victim is sequence and _last(self.running) is not sequence):
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
        self._stop_running(sequence)
        self._wait(sequence)

    def _step(self, chosen: "Chosen") -> ScheduledStep:
        counts, drawn = chosen.counts, dict(self._drawing).get(chosen.ahead_of, {})
        token_ids: array[int] = array("q")
        rows = StepRows()
        for sequence, count in counts.items():
            first, stop = len(token_ids), sequence.num_scheduled_tokens
            if stop - count < sequence.num_tokens:
                token_ids.extend(sequence.token_ids[stop - count : stop])
                token_ids.extend(sequence.drafts)
            else:
                token_ids.append(drawn_before(drawn[sequence]))
            rows.add_given(sequence, first, count)
            if stop - len(sequence.drafts) >= sequence.num_tokens and sequence.max_tokens:
                rows.add_draws(sequence, first + count - 1 - len(sequence.drafts), drawn)
                for sibling in sequence.siblings:
                    self._open_slot(sibling)
                    rows.add_draws(sibling, first + count - 1, drawn)
        self._next_step += 1
        self._drawing.append((self._next_step, rows.drawing))
        for sequence in counts:
            sequence.last_step = self._next_step
        step = StepInput(
            step_id=self._next_step,
            token_ids=token_ids,
            query_lens=tuple(counts.values()),
            context_lens=tuple(sequence.num_scheduled_tokens - count for sequence, count in counts.items()),
            block_tables=tuple(array("i", sequence.block_table) for sequence in counts),
            samples=tuple(rows.samples),
            copies=tuple(chosen.copies),
            histories=tuple(rows.histories),
            masks=rows.masks,
            given=tuple(rows.given),
            pooled=tuple(rows.pooled),
            ahead_of=chosen.ahead_of,
        )
        drafts = tuple(sequence.drafts for sequence in counts)
        return ScheduledStep(step, tuple(counts), drafts, tuple(rows.draws), tuple(rows.scored), tuple(rows.in_pool))

    # ---- and back -----------------------------------------------------------------------------------------------

    def update(self, step: ScheduledStep, output: StepOutput, heed: Heed = lambda sequence: None) -> list[Sequence]:
        """Takes what a step drew; gives the sequences that it moved on, some of them finished by it."""
        assert len(output.token_ids) == len(step.input.samples)
        if step.input.model:
            assert self._draft_steps is not None
            self._draft_steps.update(step, output)
            for sequence in step.sequences:
                self._has_ended(sequence)
            return []
        moved: dict[Sequence, None] = {}
        for sequence, count, drafts in zip(step.sequences, step.input.query_lens, step.drafts, strict=True):
            sequence.num_in_flight -= count
            if drafts:
                sequence.drafts = ()
            if not self._has_ended(sequence):
                self._computed(sequence, count - len(drafts))
        for sequence, scores in zip(step.given, output.given, strict=True):
            sequence.prompt_scores += scores
        for sequence, part in zip(step.pooled, output.pooled, strict=True):
            sequence.pooled_parts.append(part)
        for sequence in step.sequences:
            if not sequence.max_tokens and not sequence.num_pending_tokens and not sequence.num_in_flight:
                moved[sequence] = None
                self.finish(sequence, "length")
        for sequence, _ in step.draws:
            if sequence.parent is not None:
                self._begin_sibling(sequence, sequence.parent)
        errors, first = dict(output.errors), 0
        for sequence, drafts in step.draws:
            samples = range(first, first + 1 + len(drafts))
            first = samples.stop
            sequence.num_draws_in_flight -= 1
            if sequence.status is not SequenceStatus.FINISHED:
                moved[sequence] = None
                self._accept(sequence, drafts, samples, output, errors, heed)
        return list(moved)

    def _has_ended(self, sequence: Sequence) -> bool:
        """Whether a sequence was ended while the step that is back was in flight; its blocks are free then."""
        if sequence.status is not SequenceStatus.FINISHED:
            return False
        if not sequence.is_in_flight:
            self.ended_in_flight.remove(sequence)
            self.blocks.free(sequence)
        return True

    def _computed(self, sequence: Sequence, count: int) -> None:
        sequence.num_computed_tokens += count
        self.num_pending_tokens -= count
        self.blocks.commit(sequence)

    def _accept(
        self,
        sequence: Sequence,
        drafts: Seq[int],
        samples: Seq[int],
        output: StepOutput,
        errors: Mapping[int, str],
        heed: Heed,
    ) -> None:
        """Appends what was drawn: the first token, and one more for each draft that was drawn before it."""
        num_guessed = len(drafts) if sequence.num_output_tokens >= len(sequence.forced) else 0
        sequence.num_drafted += num_guessed
        self.num_drafted += num_guessed
        num_before = sequence.num_tokens
        for place, sample in enumerate(samples):
            if place:
                if drafts[place - 1] != sequence.token_ids[-1]:
                    break
                self._computed(sequence, 1)
            if sample in errors:
                sequence.error = errors[sample]
                self.finish(sequence, "error")
                return
            told = None if output.logprobs is None else output.logprobs[sample]
            if sequence.num_candidates:
                sequence.is_held, sequence.candidates = True, told
                return
            self._append(sequence, output.token_ids[sample], told)
            if place and num_guessed:
                sequence.num_accepted += 1
                self.num_accepted += 1
            reason = heed(sequence) or sequence.finish_reason_now()
            if reason is not None:
                self.finish(sequence, reason)
                return
        # What was made of guesses that were wrong is worth nothing.
        sequence.num_told_tokens = min(sequence.num_told_tokens, sequence.num_tokens - 1)
        sequence.num_draft_computed = min(sequence.num_draft_computed, sequence.num_tokens - 1)
        if self.speculator is not None:
            self.speculator.observe(sequence, len(drafts), sequence.num_tokens - num_before - 1)

    def _append(self, sequence: Sequence, token_id: int, told: TokenLogprobs | None) -> None:
        self.num_expected_tokens -= sequence.num_expected_tokens > 0  # the one that it is
        self.num_pending_tokens += 1
        sequence.token_ids.append(token_id)
        if told is not None:
            sequence.scores.append(told)

    def _begin_sibling(self, sequence: Sequence, parent: Sequence) -> None:
        """Lets a sequence go its own way whose first token has been drawn with another's, before that one ends."""
        parent.siblings.remove(sequence)
        sequence.parent = None
        self.blocks.fork(parent, sequence)
        sequence.num_cached_tokens = parent.num_cached_tokens
        self._run(sequence)
        self._count(sequence, 1)

    def advance_beams(self, beams: Seq[Sequence], heirs: Seq[tuple[int, int]]) -> list[Sequence]:
        """Lets beams go on that are held. heirs: (one of the beams, its next token) for each of those that there are to
        be; a beam without any ends. Gives the heirs, of which a beam's first is itself, others share its blocks."""
        inherited = {beam for beam, _ in heirs}
        for number, beam in enumerate(beams):
            assert beam.is_held
            beam.is_held, beam.candidates, beam.num_beams_to_come = False, None, 0
            if number not in inherited:
                self.finish(beam, "abort")
        sequences = []
        for number, _ in heirs:
            sequences.append(beams[number] if number in inherited else self._fork(beams[number]))
            inherited.discard(number)
        for sequence, (_, token_id) in zip(sequences, heirs, strict=True):
            self._append(sequence, token_id, None)
        return sequences

    def _fork(self, sequence: Sequence) -> Sequence:
        other = sequence.fork()
        if sequence.status is SequenceStatus.RUNNING and self._num_places < self.max_num_seqs:
            self.blocks.fork(sequence, other)
            self._run(other)
        else:
            self._wait(other)
        self._count(other, 1)
        return other

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Ends a sequence, whatever it is doing, and its siblings that are not begun; nothing if it has ended.

        Its blocks are freed once no step has it.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        for sibling in list(sequence.siblings):
            self.finish(sibling, reason)
        if sequence.parent is not None:
            sequence.parent.siblings.remove(sequence)
            sequence.parent = None
            self._close_slot(sequence)
        else:
            if sequence.status is SequenceStatus.WAITING:
                self.waiting.remove(sequence)
            else:
                self._stop_running(sequence)
            self._count(sequence, -1)
            self._forget_match(sequence)
        sequence.move_to(SequenceStatus.FINISHED)
        sequence.finish_reason = reason
        if self.speculator is not None:
            self.speculator.end(sequence)
        if sequence.is_in_flight:
            self.ended_in_flight.append(sequence)
        else:
            self.blocks.free(sequence)

    def check(self) -> None:
        """Proves the bookkeeping whole. Raises AssertionError."""
        assert all(s.status is SequenceStatus.WAITING and not s.block_table for s in self.waiting)
        assert self.waiting == sorted(self.waiting, key=lambda s: (s.priority, s.order))
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.FINISHED and s.is_in_flight for s in self.ended_in_flight)
        idle = [s for s in self.running if not s.is_in_flight]
        assert all(s.num_draft_computed <= s.num_tokens + len(s.drafted) for s in idle)
        unended = [*self.waiting, *self.running]
        assert self.num_pending_tokens == sum(s.num_pending_tokens for s in unended)
        assert self.num_expected_tokens == sum(s.num_expected_tokens for s in unended)
        assert self.num_matched_tokens == sum(s.num_matched_tokens for s in self.waiting)
        assert not any(s.num_matched_tokens for s in [*self.running, *self.ended_in_flight])
        attached = [sibling for s in unended for sibling in s.siblings]
        slots = [s.slot for s in (*self.running, *attached) if s.slot is not None]
        assert sorted(slots + self._free_slots) == list(range(self.max_num_seqs)), "a slot is lost or held twice"
        self.blocks.check([*self.waiting, *self.running, *self.ended_in_flight])


def _num_places(sequence: Sequence) -> int:
    return 1 + len(sequence.siblings) + sequence.num_beams_to_come


def _last(running: Seq[Sequence]) -> Sequence | None:
    """Of the lowest priority, the latest to come; of its beams, one that is held; the latest admitted."""
    return max(reversed(running), key=lambda s: (s.priority, s.order, s.is_held), default=None)


def _gives_way(running: Sequence, waiting: Sequence) -> bool:
    """Whether a sequence is preempted so that another one is admitted: if its priority is lower; a beam that is held
    also if it came no sooner, since it may be the others of its group that wait, and all that runs be held."""
    if running.is_held:
        return (running.priority, running.order) >= (waiting.priority, waiting.order)
    return running.priority > waiting.priority
