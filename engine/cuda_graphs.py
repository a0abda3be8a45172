"""Decode steps from CUDA graphs: what a stage launches for a batch of some size is recorded once, then replayed.

A step in which every sequence computes one token takes the recording of the next larger size (`recordings.py`).
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..shardformer.base import Stage
from .recordings import DecodeRecordings
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


class DecodeGraphs(DecodeRecordings):
    """A stage's graphs, and the static buffers that they read and write. Arguments: as `DecodeRecordings`; num_samples:
    of any step, at most."""

    reads_staged = True

    def __init__(
        self, stage: Stage, largest: int, longest: int, block_size: int, num_samples: int, capture: Capture
    ) -> None:
        super().__init__(stage, largest, longest, block_size)
        self._capture = capture
        self._replays: dict[int, Callable[[], None]] = {}
        self._sizes: list[int] = []  # those recorded, ascending
        self._numbers: dict[int, Tensor] = {}  # by size: the bytes of `token_shapes`
        self._drawn = torch.zeros(num_samples, dtype=torch.int64, device=stage.device)
        self._hidden_out = torch.zeros(largest, stage.spec.hidden_size, dtype=stage.dtype, device=stage.device)

    def __len__(self) -> int:
        return len(self._replays)

    def size_for(self, step: StepInput) -> int | None:
        num_seqs = len(step.query_lens)
        if step.num_tokens > num_seqs or not self._sizes or num_seqs > self._sizes[-1]:
            return None
        return self._sizes[bisect_left(self._sizes, num_seqs)]

    @torch.inference_mode()
    def record(self, size: int) -> None:
        """Makes the recording of a batch size; those of larger ones come before, whose memory it shares."""
        assert not self._sizes or size < self._sizes[0]
        shapes = token_shapes(size, size)
        self._numbers[size] = torch.zeros(num_bytes(shapes), dtype=torch.uint8, device=self._stage.device)
        arrays = views(self._numbers[size], shapes)
        arrays["slots"].fill_(-1)
        forward, out = self._forward(size, arrays), self._hidden_out[:size]

        def run() -> None:
            out.copy_(forward())

        self._replays[size] = self._capture(run)
        self._sizes.insert(0, size)

    def _token_ids(self, arrays: Mapping[str, Tensor]) -> Tensor:
        token_ids = arrays["token_ids"]
        return known_tokens(token_ids, self._drawn) if self._stage.is_first else token_ids

    def load(self, size: int, step: StepInput, sent: Sent, drawn: Tensor | None) -> None:
        """The block tables are as wide as the step needs: beyond that, and in rows of padding, the static ones hold
        what is not read."""
        numbers, tables = self._numbers[size], sent.arrays["block_tables"]
        numbers.copy_(sent.buffer[: len(numbers)])
        self._tables[:size, : tables.shape[1]].copy_(tables)
        if drawn is not None:
            self._drawn[: len(drawn)].copy_(drawn)

    def replay(self, size: int) -> Tensor:
        self._replays[size]()
        return self._hidden_out[:size]
