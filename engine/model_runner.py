"""Brings a step's plain numbers to the device, runs this rank's stage, and draws tokens on the last one."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..mesh.collectives import Communicator, Pending
from ..shardformer.backends import AttentionMetadata, Sequences
from ..shardformer.base import Stage
from .drawing import Drawing, DrawingPlan, Drawn, Head, output_of
from .drawn_tokens import DrawnTokens
from .kv_cache import KVCache, copy_blocks
from .recordings import DecodeRecordings
from .sampler import Draw
from .staging import Sent, Staging
from .step import StepInput, StepOutput
from .step_arrays import copy_shapes, known_tokens, sequences_of, step_shapes, write_step


@dataclass
class BusyTime:
    """How long this rank computed, and waited, in steps so far."""

    begun: int = 0  # steps
    steps: int = 0  # that have ended
    busy_s: float = 0.0
    first_start_s: float = 0.0  # time.monotonic() when its first step began
    last_end_s: float = 0.0

    def idle_s(self) -> float:
        """Since when no step runs; 0 if one does."""
        return 0.0 if self.begun > self.steps else time.monotonic() - self.last_end_s


class ModelRunner:
    """Executes one model's steps on one rank.

    Hidden states [num_tokens, hidden] come from the stage before and go to the stage after over `pp`; the send is
    asynchronous, so that this stage is free for the next step at once.

    loops: what the last stage draws goes to the first, which may have a step then that is ahead of it.
    """

    def __init__(
        self,
        stage: Stage,
        block_size: int,
        pp: Communicator,
        drawing: Drawing | None,
        max_num_samples: int,
        loops: bool = False,
    ) -> None:
        self.stage, self.block_size, self.pp, self.drawing = stage, block_size, pp, drawing
        self.stages = [stage]  # whose caches have the same block ids
        self.backends = stage.backends
        self.busy = BusyTime()
        self._loops = loops and pp.size > 1
        self.max_num_samples = max_num_samples  # of a step
        # Steps that can be in flight: one for each stage, and one that is ahead.
        self._drawn = DrawnTokens(pp if self._loops else None, pp.size + 1, stage.device)
        self.cache: KVCache | None = None
        self.graphs: DecodeRecordings | None = None
        self._staging = Staging(stage.device)
        self._last: StepInput | None = None
        self._sent: Pending | None = None

    def launch(self, step: StepInput) -> "RunningStep":
        """Runs one step; on a GPU, returns as soon as all of it is queued there."""
        self.busy.begun += 1
        try:
            return self._launch(step)
        except BaseException:  # Ctrl-C, too: the step is done again
            self.busy.begun -= 1
            raise

    @torch.inference_mode()
    def _launch(self, step: StepInput) -> "RunningStep":
        started = time.monotonic()
        stage = self.stage
        plan = None if self.drawing is None else self.drawing.plan(step)
        size = None if self.graphs is None else self.graphs.size_for(step)
        is_staged = size is None or (self.graphs is not None and self.graphs.reads_staged)
        padding = 0 if size is None else size - step.num_tokens
        staged = self._staging.open(
            {
                **(step_shapes(step, padding) if is_staged else {}),
                **copy_shapes(step),
                **({} if plan is None else plan.shapes),
            }
        )
        if is_staged:
            write_step(step, self.block_size, staged.host)
        if step.copies:
            staged.host["copies"][:] = tuple(zip(*step.copies, strict=True))
        if plan is not None:
            plan.write(staged.host)
        if self.drawing is not None:
            # What the last step drew may be an input of this one, and mending it is collective: on every rank it comes
            # before this step. The device idles meanwhile for as long as it takes to begin with a step that is laid out
            # already.
            self.drawing.settle()
        sent = staged.send()
        self._last = step
        if stage.is_first:
            self._drawn.expect(step)
        if step.copies:
            for cached in self.stages:
                copy_blocks(cached, *sent.arrays["copies"])

        hidden, waited = self._forward(step, sent) if size is None else self._replay(step, size, sent)
        drawn = None
        if stage.is_last:
            assert plan is not None
            drawn = self._draw(hidden, self._head(step, size), plan, sent)
        else:
            waited += self._send(hidden)
        running = RunningStep(drawn, stage.device, self._redraw, lambda: self._count(started, waited))
        if drawn is not None and drawn.draw.filtered is not None:
            assert self.drawing is not None
            self.drawing.unsettled = running.settle
        if drawn is not None:
            self._keep(drawn)
            if self._loops and step.samples:
                running.settle()  # the first stage is told what is final
                self._drawn.tell(step.step_id)
        return running

    def _forward(self, step: StepInput, sent: Sent) -> tuple[Tensor, float]:
        """Hidden states [num_tokens, hidden], on the last stage perhaps of samples alone, and seconds waited."""
        stage, waited = self.stage, 0.0
        metadata = self._metadata(step, sent)
        if stage.is_first:
            x = sent.arrays["token_ids"]
            if step.ahead_of:
                drawn, waited = self._drawn_before(step)
                x = known_tokens(x, drawn)
        else:
            x = torch.empty(step.num_tokens, stage.spec.hidden_size, dtype=stage.dtype, device=stage.device)
            waited = self._receive(x)
        return (stage(x, metadata) if self.graphs is None else self.graphs.run(x, metadata)), waited

    def _replay(self, step: StepInput, size: int, sent: Sent) -> tuple[Tensor, float]:
        """The same from a recording."""
        assert self.graphs is not None
        if self.stage.is_first:
            drawn, waited = self._drawn_before(step)
            self.graphs.load(size, step, sent, drawn)
        else:
            self.graphs.load(size, step, sent, None)
            waited = self._receive(self.graphs.hidden_in[: step.num_tokens])
        hidden = self.graphs.replay(size)[: step.num_tokens]
        return hidden if self.stage.is_last else hidden.clone(), waited  # it is sent while the next step is replayed

    @property
    def last_sequences(self) -> Sequences | None:
        """Those of the last step."""
        step = self._last
        if step is None:
            return None
        key_lens = [context + count for context, count in zip(step.context_lens, step.query_lens, strict=True)]
        return Sequences.of(step.query_lens, key_lens, step.block_tables, self.block_size, self.stage.device)

    def _metadata(self, step: StepInput, sent: Sent) -> AttentionMetadata:
        sequences = sequences_of(step, self.block_size, sent.arrays)
        return AttentionMetadata(
            positions=sent.arrays["positions"],
            slots=sent.arrays["slots"],
            plans={key: backend.prepare(sequences) for key, backend in self.backends.items()},
            wanted=sent.arrays["rows"] if self.stage.is_last and step.wants_samples_alone else None,
        )

    def _drawn_before(self, step: StepInput) -> tuple[Tensor, float]:
        """On the first stage: what the step drew that this one is ahead of, and seconds waited."""
        before = time.monotonic()
        return self._drawn.of(step), time.monotonic() - before

    def _receive(self, x: Tensor) -> float:
        """Fills it with what the stage before sends; seconds waited."""
        arriving = self.pp.irecv(x, self.pp.rank - 1)
        before = time.monotonic()
        arriving.wait()
        return time.monotonic() - before

    def _send(self, hidden: Tensor) -> float:
        """To the stage after, once the last send is done; seconds waited."""
        before = time.monotonic()
        if self._sent is not None:
            self._sent.wait()
        waited = time.monotonic() - before
        self._sent = self.pp.isend(hidden, self.pp.rank + 1)
        return waited

    def _head(self, step: StepInput, size: int | None) -> Head:
        if size is None or self.graphs is None or not step.draws_after_all:
            return self.stage.logits
        return self.graphs.head(size)

    def _draw(self, hidden: Tensor, head: Head, plan: DrawingPlan, sent: Sent) -> Drawn:
        assert self.drawing is not None
        self.drawing.begin(plan, sent.arrays, self._drawn.of(plan.step))
        return self.drawing(hidden, head, plan, sent.arrays, self.stage.last_hidden)

    @torch.inference_mode()
    def _redraw(self, drawn: Drawn, complete: list[bool]) -> Drawn:
        assert self.drawing is not None
        drawn = self.drawing.redraw(drawn, complete)
        self._keep(drawn)
        return drawn

    def _keep(self, drawn: Drawn) -> None:
        if drawn.plan.step.samples:
            self._drawn.keep(drawn.plan.step.step_id, drawn.draw.token_ids)

    def let_go(self) -> None:
        """Forgets what refers back to this runner; no step follows."""
        self.graphs = None
        if self.cache is not None:
            self.cache.let_go()
        if self.drawing is not None:
            self.drawing.unsettled = None

    def _count(self, started: float, waited: float) -> None:
        now, busy = time.monotonic(), self.busy
        if not busy.steps:
            busy.first_start_s = started + waited
        busy.busy_s += now - max(started, busy.last_end_s) - waited
        busy.last_end_s = now
        busy.steps += 1


class RunningStep:
    """A step that this rank has begun. On a GPU what it draws is on its way to the host, and nothing waits.

    redraw: makes a draw final, given which of its filtered rows are.
    """

    def __init__(
        self,
        drawn: Drawn | None,
        device: torch.device,
        redraw: Callable[[Drawn, list[bool]], Drawn],
        on_end: Callable[[], None],
    ) -> None:
        self._drawn, self._redraw, self._on_end = drawn, redraw, on_end
        self._numbers = [] if drawn is None else drawn.numbers
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._numbers = [_on_its_way(numbers) for numbers in self._numbers]
            self._copied = torch.cuda.Event()
            self._copied.record()

    def has_ended(self) -> bool:
        return self._copied is None or self._copied.query()

    def settle(self) -> None:
        """Waits for what was drawn, and draws again what is not final."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._drawn is None or self._drawn.draw.filtered is None:
            return
        complete = self._numbers[0].tolist()[len(self._drawn.draw.token_ids) :]
        drawn, numbers = replace(self._drawn, draw=Draw(self._drawn.draw.token_ids)), self._numbers
        if not all(complete):
            drawn = self._redraw(self._drawn, complete)
            numbers = [each.cpu() for each in drawn.numbers]
        self._drawn, self._numbers = drawn, numbers  # both or, interrupted, neither: it is called again

    def wait(self) -> StepOutput | None:
        """Its output on the last stage, None on others; called once."""
        self.settle()
        output = None if self._drawn is None else output_of(self._drawn, self._numbers)
        self._on_end()
        return output


def _on_its_way(numbers: Tensor) -> Tensor:
    """To the host, in memory that the copy fills while nobody waits."""
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    return host.copy_(numbers, non_blocking=True)
