"""Decode steps from tapes: what a stage on a CPU calls for a batch of some size is recorded once, then replayed.

Calling the ops of a small model takes Python longer than some of them take: a step of one sequence spends a fifth of
its time so. The first step of a batch size is recorded as it runs (`kernels/cpu/tape.py`), and those that follow are
one call of C++, interrupted where ranks communicate. Nothing is padded, and nothing is prepared at the start.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.cpu import Pool, Tape, recording
from ..mesh.collectives import Communicator
from ..shardformer.base import Stage
from .cuda_graphs import DecodeGraphs
from .staging import Sent
from .step import StepInput

LARGEST = 64  # sequences: with more, a step is long beside what its calls take


class DecodeTapes(DecodeGraphs):
    """A stage's tapes, by batch size. Arguments: as `DecodeGraphs`; tp: over which its layers communicate."""

    def __init__(
        self, stage: Stage, largest: int, longest: int, block_size: int, drawn: Tensor, tp: Communicator
    ) -> None:
        super().__init__(stage, largest, longest, block_size, drawn, self._record)
        self._largest, self._tp, self._pool = largest, tp, Pool()
        self.spoiled: str | None = None  # why this stage's steps cannot be replayed

    def size_for(self, step: StepInput) -> int | None:
        size = len(step.query_lens)
        return None if self.spoiled or step.num_tokens > size or size > self._largest else size

    def load(self, size: int, sent: Sent) -> None:
        self._buffers(size)
        super().load(size, sent)

    def replay(self, size: int) -> Tensor:
        if size in self._replays:
            return super().replay(size)
        self._replays[size] = self._record(self._forward(size))
        return self._hidden_out[:size]

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        tape = Tape(self._pool)
        self._tp.record_on(tape.do)
        try:
            with recording(tape), torch.inference_mode():
                function()
        finally:
            self._tp.record_on(None)
        self.spoiled = tape.spoiled
        return tape.replay
