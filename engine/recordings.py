"""Decode steps that are recorded once and then replayed: what graphs on a GPU and tapes on a CPU have in common.
What else tapes replay is theirs (`StepTapes.run`).

What differs from step to step lies in static buffers, which the recorded ops read anew at each replay:

    3 sequences, size 4     token_ids   17   3  99   0
                            slots       35  80   4  -1      padding: stored nowhere,
                            key_lens    20   1   5   0      and attends to nothing

How a launch divides its work is recorded too, for sequences of any length: see `_num_keys`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import isqrt

import torch
from torch import Tensor

from ..kernels.batch import PagedBatch
from ..shardformer.backends import AttentionMetadata, Sequences
from ..shardformer.base import Stage
from .drawing import Head
from .staging import Sent
from .step import StepInput


class DecodeRecordings(ABC):
    """A stage's recordings, by batch size. longest: tokens of a sequence, at most."""

    reads_staged: bool
    """Whether `load` takes a step's arrays from where they were staged; else it takes the step itself."""

    def __init__(self, stage: Stage, largest: int, longest: int, block_size: int) -> None:
        self._stage, self._longest, self._block_size = stage, longest, block_size
        device, hidden_size = stage.device, stage.spec.hidden_size
        self._tables = torch.zeros(largest, -(-longest // block_size), dtype=torch.int32, device=device)
        self._starts = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self.hidden_in = torch.zeros(0 if stage.is_first else largest, hidden_size, dtype=stage.dtype, device=device)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def size_for(self, step: StepInput) -> int | None:
        """The batch size that a step is padded to; None if it is not to run from a recording."""

    @abstractmethod
    def load(self, size: int, step: StepInput, sent: Sent, drawn: Tensor | None) -> None:
        """Takes the numbers of a step that is padded to `size`. drawn: on the first stage, what the step
        drew that it is ahead of."""

    @abstractmethod
    def replay(self, size: int) -> Tensor:
        """Hidden states [size, hidden], until the next replay."""

    def run(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """A forward of a step that has no size."""
        hidden: Tensor = self._stage(x, metadata)
        return hidden

    def head(self, size: int) -> Head:
        """Gives the logits of all that `replay` has given, until the next replay."""
        return self._stage.logits

    def _forward(self, size: int, arrays: Mapping[str, Tensor]) -> Callable[[], Tensor]:
        """What is recorded: all of a step's forward that happens on the device. arrays: of `token_shapes`."""
        stage = self._stage
        batch = PagedBatch(
            block_tables=self._tables[:size],
            query_starts=self._starts[: size + 1],
            key_lens=arrays["key_lens"],
            max_query_len=1,
            max_key_len=self._longest,
            min_query_len=1,
            num_keys=_num_keys(size, self._longest),
        )
        sequences = Sequences((1,) * size, (self._longest,) * size, ((),) * size, self._block_size, batch)

        def forward() -> Tensor:
            plans = {key: backend.prepare(sequences) for key, backend in stage.backends.items()}
            x = self._token_ids(arrays) if stage.is_first else self.hidden_in[:size]
            return stage(x, AttentionMetadata(positions=arrays["positions"], slots=arrays["slots"], plans=plans))

        return forward

    def _token_ids(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return arrays["token_ids"]


def _num_keys(size: int, longest: int) -> int:
    """How many keys a batch is taken to have when a launch is recorded that divides them over programs.

    A replay finds any lengths. The Triton kernel gives a program 256 keys or more, whatever the number that was
    recorded, so that short sequences are not divided too finely; programs without keys end at once, and one launch a
    layer puts together even what was not divided. Were all sequences taken for the longest, large batches would hardly
    be divided, and one long sequence among short ones would keep everything waiting; were one of them, there would be
    thousands of programs without keys. Between these: as many of the longest as the square root of the batch. Not
    measured yet: on paper, with 8 KV heads on a Hopper GPU, 6 parts at 64 sequences, and about 2 µs a layer more for
    contexts of up to 256 keys.
    """
    return longest * isqrt(size)
