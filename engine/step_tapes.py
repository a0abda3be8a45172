"""Steps from tapes: what a stage on a CPU calls for a batch of decodes of some size is recorded once, then replayed.

Calling the ops of a small model takes Python longer than some of them take: a step of one sequence spends a fifth of
its time so. The first step of a batch size is recorded as it runs (`kernels/cpu/tape.py`), and those that follow are
one call of C++, and one more for the logits. Nothing is padded, and nothing is prepared at the start. Steps with
prompts are replayed as well, all but the model's last layer, for any number of tokens up to the most that were
recorded.

Reading the weights of a model leaves nothing else in the caches, and what runs between two steps runs cold: its time
goes by how many different things it calls. So a step's numbers are written straight to where its recording reads them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..kernels.batch import PagedBatch
from ..kernels.cpu import Extent, Pool, Tape, VaryingTape, lent, recording
from ..mesh.collectives import Communicator
from ..shardformer.backends import AttentionMetadata
from ..shardformer.base import Stage
from .drawing import Head
from .recordings import DecodeRecordings
from .staging import Sent
from .step import StepInput, drawn_before
from .step_arrays import token_shapes

T = TypeVar("T")

LARGEST = 64  # sequences: with more, a step is long beside what its calls take
MOST_TOKENS = 2048  # of a step with prompts: the same


@dataclass(frozen=True)
class Recorded:
    """A stage's forward with so many sequences."""

    tape: Tape
    hidden: Tensor  # what it writes


class StepTapes(DecodeRecordings):
    """A stage's tapes: of decodes by batch size, and one of steps with prompts.

    Arguments: as `DecodeRecordings`; tp: over which its layers communicate.
    """

    reads_staged = False

    def __init__(self, stage: Stage, largest: int, longest: int, block_size: int, tp: Communicator) -> None:
        super().__init__(stage, largest, longest, block_size)
        self._largest, self._tp, self._pool = largest, tp, Pool()
        self._recorded: dict[int, Recorded] = {}
        self._heads: dict[int, Head] = {}
        self._inputs: dict[int, dict[str, Any]] = {}
        self._flat_tables: Any = memoryview(self._tables.view(-1).numpy())  # type: ignore[arg-type]
        self.spoiled: str | None = None  # why this stage's steps cannot be replayed
        self._prompts: VaryingTape | None = None  # what steps of others than decodes begin with
        self._most_tokens = MOST_TOKENS

    def __len__(self) -> int:
        return len(self._recorded)

    def size_for(self, step: StepInput) -> int | None:
        size = len(step.query_lens)
        return None if self.spoiled or step.num_tokens > size or size > self._largest else size

    def load(self, size: int, step: StepInput, sent: Sent, drawn: Tensor | None) -> None:
        if size not in self._inputs:
            arrays = token_shapes(size, size).items()
            self._inputs[size] = {name: torch.zeros(shape, dtype=dtype).numpy() for name, (dtype, shape) in arrays}
        inputs, tables, contexts, width = self._inputs[size], step.block_tables, step.context_lens, self._block_size
        inputs["token_ids"][:] = (
            _known(step.token_ids, drawn) if drawn is not None and step.ahead_of else step.token_ids
        )
        inputs["positions"][:] = contexts
        inputs["key_lens"][:] = [context + 1 for context in contexts]
        places = zip(tables, contexts, strict=True)
        inputs["slots"][:] = [table[context // width] * width + context % width for table, context in places]
        flat, stride = self._flat_tables, self._tables.shape[1]
        for row, table in enumerate(tables):
            flat[row * stride : row * stride + len(table)] = table

    def replay(self, size: int) -> Tensor:
        recorded = self._recorded.get(size)
        if recorded is None:
            recorded = self._recorded[size] = self._record(size)
        else:
            recorded.tape.replay()
        return recorded.hidden

    def _record(self, size: int) -> Recorded:
        """Runs the forward as well."""
        arrays = {name: torch.from_numpy(array) for name, array in self._inputs[size].items()}
        tape, hidden = self._on_tape(Tape(self._pool), self._forward(size, arrays))
        self.spoiled = tape.spoiled
        return Recorded(tape, hidden)

    def head(self, size: int) -> Head:
        return self._heads.get(size) or partial(self._record_head, size)

    def _record_head(self, size: int, hidden: Tensor) -> Tensor:
        """Runs it as well. Of logits, which are large, no tape keeps its own: they lie where the next recording may."""
        tape, logits = self._on_tape(Tape(self._pool), lambda: self._stage.logits(hidden))
        self._heads[size] = _Head(tape, lent(logits)) if tape.is_one_call else self._stage.logits
        return logits

    def _on_tape(self, tape: Tape, function: Callable[[], T]) -> tuple[Tape, T]:
        """What it calls, and what it gives."""
        self._tp.record_on(tape)
        try:
            with recording(tape), torch.inference_mode():
                return tape, function()
        finally:
            self._tp.record_on(None)

    # ---- steps with prompts -------------------------------------------------------------------------------------

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """All but the end of it is replayed, once as many tokens were recorded."""
        num_tokens, stage = len(x), self._stage
        batch = next(iter(metadata.plans.values()))
        if not 1 < num_tokens <= self._most_tokens or not isinstance(batch, PagedBatch):
            return super().run(x, metadata)
        x = stage.embed(x, metadata)
        extent = Extent(num_tokens, *batch.block_tables.shape)
        inputs = {
            "x": x,
            "positions": metadata.positions,
            "slots": metadata.slots,
            "block_tables": batch.block_tables,
            "query_starts": batch.query_starts,
            "key_lens": batch.key_lens,
        }
        if self._prompts is not None and num_tokens <= self._prompts.most_tokens:
            begun = self._prompts.replay(extent, inputs)
        else:
            # In memory of its own: that of shorter steps goes, and so does all where it cannot be replayed.
            tape, begun = self._on_tape(Tape(Pool(), calls_only=True), lambda: [*stage.begin(x, metadata)])
            try:
                self._prompts = VaryingTape(tape, extent, inputs, begun)
            except ValueError:  # with fewer it may be: some products are torch's of many rows alone
                could = 0 if self._prompts is None else self._prompts.most_tokens
                self._most_tokens = (could + num_tokens) // 2
        h, residual = begun
        assert h is not None
        hidden = stage.end(h, residual, metadata)
        return hidden.clone() if hidden is h else hidden  # it is sent while the next step is replayed


@dataclass(frozen=True)
class _Head:
    tape: Tape
    logits: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        self.tape.replay()
        return self.logits


def _known(token_ids: Sequence[int], drawn: Tensor) -> list[int]:
    """With those that an earlier step drew (`drawn_before`)."""
    known = drawn.tolist()
    return [known[drawn_before(token_id)] if token_id < 0 else token_id for token_id in token_ids]
