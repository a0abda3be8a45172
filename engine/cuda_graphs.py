"""Decode steps from CUDA graphs: what a stage launches for a batch of some size is recorded once, then replayed.

A step in which every sequence computes one token takes the recording of the next larger size. What differs from step
to step lies in static buffers, which the kernels read anew at each replay:

    3 sequences, size 4     token_ids   17   3  99   0
                            slots       35  80   4  -1      padding: stored nowhere,
                            key_lens    20   1   5   0      and attends to nothing

How a launch divides its work is recorded too, for sequences of any length: see `_num_keys`.
"""

from bisect import bisect_left
from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from ..kernels.batch import PagedBatch
from ..shardformer.backends import AttentionMetadata, Sequences
from ..shardformer.base import Stage
from .staging import Sent, num_bytes, views
from .step import StepInput
from .step_arrays import known_tokens, token_shapes

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does on the device; the result does it again, on the same memory."""

_LARGEST = 512  # sequences: with more, a step is long beside what its launches take


def ladder(most: int) -> tuple[int, ...]:
    """Batch sizes to be recorded where up to `most` sequences run, the largest first."""
    most = min(most, _LARGEST)
    return tuple(sorted({*(n for n in (1, 2, 4, *range(8, 256, 8), *range(256, 512, 16)) if n < most), most}))[::-1]


class CudaCapture:
    """CUDA graphs that share one pool of memory: of a smaller batch, recorded later, all finds room in it."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()  # compiles kernels, opens connections: nothing that may happen while a graph is recorded
        torch.cuda.current_stream().wait_stream(self._stream)
        # Other threads, NCCL's among them, may go on calling CUDA.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


def rerun(function: Callable[[], None]) -> Callable[[], None]:
    """Stands in for a graph on a CPU, which has none: padding and static buffers are then tested there."""
    function()
    return function


class DecodeGraphs:
    """A stage's recordings, by batch size, and the static buffers that they read and write.

    longest: tokens of a sequence, at most; drawn: as `ModelRunner.drawn`.
    """

    def __init__(
        self, stage: Stage, largest: int, longest: int, block_size: int, drawn: Tensor, capture: Capture
    ) -> None:
        self._stage, self._longest, self._block_size, self._drawn = stage, longest, block_size, drawn
        self._capture = capture
        self._replays: dict[int, Callable[[], None]] = {}
        self._sizes: list[int] = []  # those recorded, ascending
        self._numbers: dict[int, Tensor] = {}  # by size: the bytes of `token_shapes`
        device, hidden_size = stage.device, stage.spec.hidden_size
        self._tables = torch.zeros(largest, -(-longest // block_size), dtype=torch.int32, device=device)
        self._starts = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self.hidden_in = torch.zeros(0 if stage.is_first else largest, hidden_size, dtype=stage.dtype, device=device)
        self._hidden_out = torch.zeros(largest, hidden_size, dtype=stage.dtype, device=device)

    def __len__(self) -> int:
        return len(self._replays)

    def size_for(self, step: StepInput) -> int | None:
        """The batch size that a step is padded to; None if it is not to run from a recording."""
        num_seqs = len(step.query_lens)
        if step.num_tokens > num_seqs or not self._sizes or num_seqs > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    @torch.inference_mode()
    def record(self, size: int) -> None:
        """Makes the recording of a batch size; those of larger ones come before, whose memory it shares."""
        assert not self._sizes or size < self._sizes[0]
        self._buffers(size)["slots"].fill_(-1)
        self._replays[size] = self._capture(self._forward(size))
        self._sizes.insert(0, size)

    def _buffers(self, size: int) -> dict[str, Tensor]:
        """The arrays of `token_shapes` that a recording reads, from its `_numbers`."""
        shapes = token_shapes(size, size)
        if size not in self._numbers:
            self._numbers[size] = torch.zeros(num_bytes(shapes), dtype=torch.uint8, device=self._stage.device)
        return views(self._numbers[size], shapes)

    def _forward(self, size: int) -> Callable[[], None]:
        """What is recorded: all of a step's forward that happens on the device."""
        stage, arrays = self._stage, self._buffers(size)
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

        def run() -> None:
            plans = {key: backend.prepare(sequences) for key, backend in stage.backends.items()}
            x = self.hidden_in[:size]
            if stage.is_first:
                x = arrays["token_ids"]
                if stage.is_last:  # else no step takes what the one before draws
                    x = known_tokens(x, self._drawn)
            metadata = AttentionMetadata(positions=arrays["positions"], slots=arrays["slots"], plans=plans)
            self._hidden_out[:size].copy_(stage(x, metadata))

        return run

    def load(self, size: int, sent: Sent) -> None:
        """Takes the arrays of a step that is padded to `size`. The block tables are as wide as the step needs: beyond
        that, and in rows of padding, the static ones hold what is not read."""
        numbers, tables = self._numbers[size], sent.arrays["block_tables"]
        numbers.copy_(sent.buffer[: len(numbers)])
        self._tables[:size, : tables.shape[1]].copy_(tables)

    def replay(self, size: int) -> Tensor:
        """Hidden states [size, hidden], until the next replay."""
        self._replays[size]()
        return self._hidden_out[:size]


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
