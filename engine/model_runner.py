"""Brings a step's plain numbers to the device, runs this rank's stage, and draws tokens on the last one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mesh.collectives import Communicator, Pending
from ..shardformer.backends import AttentionMetadata, Sequences
from ..shardformer.base import Stage
from .cuda_graphs import DecodeGraphs
from .sampler import Draw, Draws, Sampler
from .staging import Sent, Staging
from .step import StepInput, StepOutput
from .step_arrays import known_tokens, sequences_of, step_shapes, write_step


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

    def __init__(
        self, stage: Stage, block_size: int, pp: Communicator, sampler: Sampler | None, max_num_seqs: int
    ) -> None:
        self.stage, self.block_size, self.pp, self.sampler = stage, block_size, pp, sampler
        self.backends = stage.backends
        self.busy = BusyTime()
        self.drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=stage.device)  # by the last step's samples
        self.graphs: DecodeGraphs | None = None
        self._staging = Staging(stage.device)
        self._last: StepInput | None = None
        self._sent: Pending | None = None
        self._uncertain: RunningStep | None = None  # the last step, if its draw may have to be mended

    @torch.inference_mode()
    def launch(self, step: StepInput) -> "RunningStep":
        """Runs one step; on a GPU, returns as soon as all of it is queued there."""
        started = time.monotonic()
        stage = self.stage
        draws = None if self.sampler is None else self.sampler.plan(step.samples)
        size = None if self.graphs is None else self.graphs.size_for(step)
        padding = 0 if size is None else size - step.num_tokens
        staged = self._staging.open({**step_shapes(step, padding), **({} if draws is None else draws.shapes)})
        write_step(step, self.block_size, staged.host)
        if draws is not None:
            draws.write(staged.host)
        if self._uncertain is not None:
            # Its tokens may be inputs of this step, and mending them is collective: on every rank it comes before this
            # step. The device idles meanwhile for as long as it takes to begin with a step that is laid out already.
            self._uncertain.settle()
            self._uncertain = None
        sent = staged.send()
        self._last = step

        hidden, waited = self._forward(step, sent) if size is None else self._replay(step, size, sent)
        draw = None
        if stage.is_last:
            assert draws is not None
            draw = self._draw(step, hidden, draws, sent)
        else:
            waited += self._send(hidden)
        running = RunningStep(step.step_id, draw, stage.device, self._redraw, lambda: self._count(started, waited))
        if draw is not None and draw.complete is not None:
            self._uncertain = running
        return running

    def _forward(self, step: StepInput, sent: Sent) -> tuple[Tensor, float]:
        """Hidden states [num_tokens, hidden], and seconds waited."""
        stage, waited = self.stage, 0.0
        metadata = self._metadata(step, sent)
        if stage.is_first:
            x = sent.arrays["token_ids"]
            if min(step.token_ids) < 0:
                x = known_tokens(x, self.drawn)
        else:
            x = torch.empty(step.num_tokens, stage.spec.hidden_size, dtype=stage.dtype, device=stage.device)
            waited = self._receive(x)
        return stage(x, metadata), waited

    def _replay(self, step: StepInput, size: int, sent: Sent) -> tuple[Tensor, float]:
        """The same from a recording."""
        assert self.graphs is not None
        self.graphs.load(size, sent)
        waited = 0.0 if self.stage.is_first else self._receive(self.graphs.hidden_in[: step.num_tokens])
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
        )

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

    def _draw(self, step: StepInput, hidden: Tensor, draws: Draws, sent: Sent) -> Draw:
        if not step.samples:
            return Draw(self.drawn[:0])
        assert self.sampler is not None
        draw = self.sampler(self.stage.logits(hidden.index_select(0, sent.arrays["rows"])), draws, sent.arrays)
        self.drawn[: len(draw.token_ids)].copy_(draw.token_ids)
        return draw

    @torch.inference_mode()
    def _redraw(self, draw: Draw, complete: list[bool]) -> Tensor:
        assert self.sampler is not None
        token_ids = self.sampler.redraw(draw, complete)
        self.drawn[: len(token_ids)].copy_(token_ids)
        return token_ids

    def let_go(self) -> None:
        """Forgets what refers back to this runner; no step follows."""
        self.graphs = self._uncertain = None

    def _count(self, started: float, waited: float) -> None:
        now, busy = time.monotonic(), self.busy
        if not busy.steps:
            busy.first_start_s = started + waited
        busy.steps += 1
        busy.busy_s += now - max(started, busy.last_end_s) - waited
        busy.last_end_s = now


class RunningStep:
    """A step that this rank has begun. On a GPU what it draws is on its way to the host, and nothing waits.

    redraw: makes the token ids of a draw final, given which of its filtered rows are.
    """

    def __init__(
        self,
        step_id: int,
        draw: Draw | None,
        device: torch.device,
        redraw: Callable[[Draw, list[bool]], Tensor],
        on_end: Callable[[], None],
    ) -> None:
        self._step_id, self._draw, self._redraw, self._on_end = step_id, draw, redraw, on_end
        self._token_ids: tuple[int, ...] | None = None  # once they are settled
        self._numbers = None if draw is None else draw.numbers
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            if self._numbers is not None:
                numbers = self._numbers
                self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
                self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def has_ended(self) -> bool:
        return self._copied is None or self._copied.query()

    def settle(self) -> None:
        """Waits for what was drawn, and draws again what is not final."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._draw is None or self._numbers is None:
            return
        numbers, num_rows = self._numbers.tolist(), len(self._draw.token_ids)
        token_ids, complete = numbers[:num_rows], numbers[num_rows:]
        if not all(complete):
            token_ids = self._redraw(self._draw, complete).tolist()
        self._token_ids = tuple(token_ids)
        self._draw = None

    def wait(self) -> StepOutput | None:
        """Its output on the last stage, None on others; called once."""
        self.settle()
        self._on_end()
        return None if self._token_ids is None else StepOutput(self._step_id, self._token_ids)
