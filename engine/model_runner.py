"""Turns a step's plain numbers into tensors, runs this rank's stage, and draws tokens on the last one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..mesh.collectives import Communicator, Pending
from ..shardformer.backends import AttentionMetadata, Sequences
from ..shardformer.stage import PipelineStage
from .sampler import Sampler
from .step import StepInput, StepOutput, drawn_before


@dataclass
class BusyTime:
    """How long this rank computed, and waited, in steps so far."""

    steps: int = 0
    busy_s: float = 0.0
    first_start_s: float = 0.0  # time.monotonic() when its first step began
    last_end_s: float = 0.0


class ModelRunner:
    """Executes steps on one rank.

    Hidden states [num_tokens, hidden] come from the stage before and go to the stage after over `pp`; the send is
    asynchronous, so that this stage is free for the next step at once.
    """

    def __init__(self, stage: PipelineStage, block_size: int, pp: Communicator, sampler: Sampler | None) -> None:
        self.stage, self.block_size, self.pp, self.sampler = stage, block_size, pp, sampler
        self.backends = stage.backends
        self.last: Sequences | None = None  # of the last step
        self.busy = BusyTime()
        self._sent: Pending | None = None
        self._drawn = torch.empty(0, dtype=torch.int64)  # by the last step's samples

    @torch.inference_mode()
    def launch(self, step: StepInput) -> "RunningStep":
        """Runs one step; on a GPU, returns as soon as all of it is queued there."""
        started = time.monotonic()
        stage, device = self.stage, self.stage.device
        metadata = self._metadata(step)
        waited = 0.0
        if stage.is_first:
            x = self._token_ids(step)
        else:
            x = torch.empty(step.num_tokens, stage.spec.hidden_size, dtype=stage.dtype, device=device)
            arriving = self.pp.irecv(x, self.pp.rank - 1)
            before = time.monotonic()
            arriving.wait()
            waited = time.monotonic() - before
        hidden = stage(x, metadata)
        drawn = None
        if not stage.is_last:
            before = time.monotonic()
            if self._sent is not None:
                self._sent.wait()
            waited += time.monotonic() - before
            self._sent = self.pp.isend(hidden, self.pp.rank + 1)
        else:
            drawn = self._drawn = self._sample(step, hidden)
        return RunningStep(step.step_id, drawn, device, lambda: self._count(started, waited))

    def _token_ids(self, step: StepInput) -> Tensor:
        """[num_tokens] int64; what the step before drew is taken from there, whether the driver knows it yet or not."""
        given = torch.frombuffer(step.token_ids, dtype=torch.int64)
        token_ids = given.to(self.stage.device)
        if not (given < 0).any():
            return token_ids
        return torch.where(token_ids < 0, self._drawn[drawn_before(token_ids).clamp_(min=0)], token_ids)

    def _sample(self, step: StepInput, hidden: Tensor) -> Tensor:
        """Token ids [num_samples]."""
        if not step.samples:
            return torch.empty(0, dtype=torch.int64, device=hidden.device)
        assert self.sampler is not None
        last = np.cumsum(step.query_lens) - 1
        rows = torch.from_numpy(last[[sample.sequence for sample in step.samples]]).to(hidden.device)
        return self.sampler(self.stage.logits(hidden.index_select(0, rows)), step.samples)

    def _metadata(self, step: StepInput) -> AttentionMetadata:
        size = self.block_size
        positions = np.empty(step.num_tokens, dtype=np.int64)
        slots = np.empty(step.num_tokens, dtype=np.int64)
        start = 0
        for count, context, table in zip(step.query_lens, step.context_lens, step.block_tables, strict=True):
            if count == 1:
                positions[start] = context
                slots[start] = table[context // size] * size + context % size
            else:
                place = np.arange(context, context + count)
                positions[start : start + count] = place
                slots[start : start + count] = np.frombuffer(table, np.int32)[place // size] * size + place % size
            start += count
        sequences = Sequences(
            query_lens=step.query_lens,
            key_lens=[context + count for context, count in zip(step.context_lens, step.query_lens, strict=True)],
            block_tables=step.block_tables,
            block_size=size,
        )
        self.last, device = sequences, self.stage.device
        return AttentionMetadata(
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(slots).to(device),
            plans={name: backend.prepare(sequences) for name, backend in self.backends.items()},
        )

    def _count(self, started: float, waited: float) -> None:
        now, busy = time.monotonic(), self.busy
        if not busy.steps:
            busy.first_start_s = started + waited
        busy.steps += 1
        busy.busy_s += now - max(started, busy.last_end_s) - waited
        busy.last_end_s = now


class RunningStep:
    """A step that this rank has begun. On a GPU its token ids are on their way to the host, and nothing waits."""

    def __init__(self, step_id: int, drawn: Tensor | None, device: torch.device, on_end: Callable[[], None]) -> None:
        self._step_id, self._drawn, self._on_end = step_id, drawn, on_end
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            if drawn is not None:
                self._drawn = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
                self._drawn.copy_(drawn, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def has_ended(self) -> bool:
        return self._copied is None or self._copied.query()

    def wait(self) -> StepOutput | None:
        """Its output on the last stage, None on others; called once."""
        if self._copied is not None:
            self._copied.synchronize()
        self._on_end()
        return None if self._drawn is None else StepOutput(self._step_id, tuple(self._drawn.tolist()))
