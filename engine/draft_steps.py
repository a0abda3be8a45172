"""Which sequences the draft model goes on with, and how far: plain Python, no torch.

A sequence that has caught up, but for its last token, is guessed ahead before its next step: as many tokens as its
`DraftLength` finds worth it, one in each step of the draft model, for all such sequences of the batch together. Then
its own step checks them.

    draft step 1   draft model computes what it has not seen yet, up to the last token x4; draws y5
    draft step 2   computes y5, draws y6
    draft step 3   computes y6, draws y7
    step           target computes x4 y5 y6 y7, draws x5 z6 z7 z8

The draft model has a cache of its own under the same block ids. What of a sequence it has computed is counted apart
(`Sequence.num_draft_computed`): after a prompt, a prefix hit, a preemption, a pause, it catches up, in chunks where
that is long. After refused drafts it goes back to the last token that stands.

With a pipeline, steps of both models are in flight on disjoint sequences.
"""

from array import array
from collections.abc import Sequence as Seq

from .block_manager import BlockManager
from .sequence import Sequence, SequenceStatus
from .speculation.speculator import DraftModelSpeculator
from .step import MAX_DRAFTS, StepInput, StepOutput
from .step_rows import ScheduledStep, StepRows


class DraftSteps:
    """Makes the steps of the draft model for one replica, and takes what they draw."""

    def __init__(
        self, blocks: BlockManager, speculator: DraftModelSpeculator, num_stages: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks, self.speculator = blocks, speculator
        self.num_stages, self.max_num_batched_tokens = num_stages, max_num_batched_tokens

    def schedule(self, running: Seq[Sequence], step_id: int) -> ScheduledStep | None:
        """The next step, or None where no sequence that is in none has something left to be drafted."""
        share = -(-len(running) // self.num_stages)
        budget = self.max_num_batched_tokens
        chosen: dict[Sequence, int] = {}  # sequence -> tokens
        copies: list[tuple[int, int]] = []
        for sequence in running:
            if len(chosen) == share or not budget:
                break
            if sequence.is_in_flight or not self._is_caught_up(sequence):
                continue
            if sequence.num_to_draft is None:
                self._begin(sequence, running, copies)
            if len(sequence.drafted) < (sequence.num_to_draft or 0):
                known = sequence.num_tokens + len(sequence.drafted)
                chosen[sequence] = count = min(known - sequence.num_draft_computed, budget)
                budget -= count
        return self._step(chosen, copies, step_id) if chosen else None

    def _is_caught_up(self, sequence: Sequence) -> bool:
        return sequence.status is SequenceStatus.RUNNING and sequence.num_pending_tokens == 1 and not sequence.is_held

    def _begin(self, sequence: Sequence, running: Seq[Sequence], copies: list[tuple[int, int]]) -> None:
        """Settles how many tokens are drafted, and takes the blocks for them, of which there must be enough for all."""
        count = self._num_wanted(sequence, -(-len(running) // self.num_stages))
        while count and not self.blocks.can_extend(sequence, sequence.num_tokens + count, len(running)):
            count -= 1
        sequence.num_to_draft = count
        if count:
            copy = self.blocks.extend(sequence, sequence.num_tokens + count)
            if copy is not None:
                copies.append(copy)

    def _num_wanted(self, sequence: Sequence, batch_size: int) -> int:
        # In the step that checks them, for all sequences alike.
        room = min(self.max_num_batched_tokens - batch_size, MAX_DRAFTS) // batch_size
        most = min(room, sequence.max_tokens - sequence.num_output_tokens - 1)
        is_forced = sequence.num_output_tokens < len(sequence.forced)
        if most <= 0 or is_forced or sequence.siblings or sequence.num_candidates:
            return 0
        return self.speculator.num_wanted(sequence, most, batch_size)

    def _step(self, chosen: dict[Sequence, int], copies: Seq[tuple[int, int]], step_id: int) -> ScheduledStep:
        token_ids, rows = array("q"), StepRows()
        for sequence, count in chosen.items():
            start, num_tokens = sequence.num_draft_computed, sequence.num_tokens
            stop = start + count
            token_ids.extend(sequence.token_ids[start:stop])
            token_ids.extend(sequence.drafted[max(0, start - num_tokens) : max(0, stop - num_tokens)])
            if stop == num_tokens + len(sequence.drafted):
                rows.add_guess(sequence, len(token_ids) - 1)
            sequence.num_drafting = count
        step = StepInput(
            step_id=step_id,
            token_ids=token_ids,
            query_lens=tuple(chosen.values()),
            context_lens=tuple(sequence.num_draft_computed for sequence in chosen),
            block_tables=tuple(array("i", sequence.block_table) for sequence in chosen),
            samples=tuple(rows.samples),
            copies=tuple(copies),
            histories=tuple(rows.histories),
            masks=rows.masks,
            model=1,
        )
        return ScheduledStep(step, tuple(chosen), ((),) * len(chosen), tuple(rows.draws))

    def update(self, step: ScheduledStep, output: StepOutput) -> None:
        for sequence, count in zip(step.sequences, step.input.query_lens, strict=True):
            sequence.num_drafting = 0
            sequence.num_draft_computed += count
        for (sequence, _), token_id in zip(step.draws, output.token_ids, strict=True):
            if sequence.status is not SequenceStatus.FINISHED:
                self._append(sequence, token_id)

    def _append(self, sequence: Sequence, token_id: int) -> None:
        sequence.drafted.append(token_id)
        ends = token_id in sequence.stop_token_ids
        if sequence.constraint is not None:
            _, num_allowed = sequence.constraint.masks(sequence.drafted)
            ends |= num_allowed < len(sequence.drafted)
            del sequence.drafted[num_allowed:]
        if ends:
            sequence.num_to_draft = len(sequence.drafted)
