"""A step's numbers on their way to the device, and what they are laid out as."""

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from meshlm.engine import staging
from meshlm.engine.drawing import Drawing
from meshlm.engine.staging import HostRing, Staging, num_bytes, views
from meshlm.engine.step import SampleRequest, SampleSettings, StepInput, drawn_before
from meshlm.engine.step_arrays import known_tokens, sequences_of, step_shapes, token_shapes, write_step
from meshlm.kernels import select_ops
from meshlm.kernels.batch import PagedBatch
from meshlm.mesh.collectives import Communicator

CPU = torch.device("cpu")
SHAPES: staging.Shapes = {
    "a": (torch.int64, (3,)),
    "none": (torch.float64, (2, 0, 1)),
    "b": (torch.int32, (2, 5)),
    "c": (torch.float32, (1,)),
}


def test_arrays_arrive_as_they_were_written() -> None:
    sender = Staging(CPU)
    first = sender.open(SHAPES)
    first.host["a"][:] = [1, 2, 3]
    first.host["b"][:] = np.arange(10).reshape(2, 5)
    first.host["c"][:] = 0.5
    sent = first.send()
    second = sender.open(SHAPES)
    second.host["b"][:] = -1
    assert sent.arrays["a"].tolist() == [1, 2, 3] and sent.arrays["c"].tolist() == [0.5]
    assert sent.arrays["b"].tolist() == [list(range(5)), list(range(5, 10))], "the next step's are apart"
    assert sent.arrays["none"].shape == (2, 0, 1)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in sent.arrays.items()} == SHAPES
    assert all(x.data_ptr() % 64 == sent.buffer.data_ptr() % 64 for name, x in sent.arrays.items() if name != "none")
    assert sent.arrays["a"].data_ptr() == sent.buffer.data_ptr() == first.host["a"].ctypes.data, "nothing is copied"
    assert len(sent.buffer) == num_bytes(SHAPES)
    assert torch.equal(views(sent.buffer.clone(), SHAPES)["b"], sent.arrays["b"])


class FakeEvent:
    """An event that comes about when a test says so, or when it is waited for."""

    def __init__(self) -> None:
        self.pending, self.waits = False, 0

    def record(self) -> None:
        self.pending = True

    def query(self) -> bool:
        return not self.pending

    def synchronize(self) -> None:
        self.waits += self.pending
        self.pending = False


def test_no_buffer_is_given_out_while_it_is_copied() -> None:
    ring = HostRing(lambda size: torch.empty(size, dtype=torch.uint8), FakeEvent)

    def take(size: int = 10) -> Any:
        buffer = ring.take(size)
        assert len(buffer.memory) >= size and buffer.copied.query(), "it is free"
        buffer.copied.record()
        return buffer

    busy = [take() for _ in range(staging._RING)]
    assert len({buffer.memory.data_ptr() for buffer in busy}) == staging._RING, "each is still under way"
    again = take()
    assert again is busy[0] and again.copied.waits == 1, "there are so many, then the oldest is waited for"
    busy[1].copied.pending = busy[2].copied.pending = False
    assert take() is busy[1] and busy[1].copied.waits == 0
    large = take(100_000)
    assert large is not busy[2] and len(large.memory) >= 100_000
    for buffer in (*busy, again, large):
        buffer.copied.pending = False
    assert [take(), take(), take()] == [busy[3], busy[0], busy[1]] and take(99_999) is large, "those in use, in turn"


def test_a_ring_of_one_while_nothing_is_under_way() -> None:
    ring = HostRing(lambda size: torch.empty(size, dtype=torch.uint8), FakeEvent)
    first = ring.take(10)
    assert all(ring.take(size) is first for size in (10, 1, 500))


def sample(row: int) -> SampleRequest:
    return SampleRequest(row, 1, SampleSettings(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0))


def step_of(query_lens: Any, contexts: Any, tables: Any, samples: Any) -> StepInput:
    tokens = array("q", range(100, 100 + sum(query_lens)))
    ends = np.cumsum(query_lens) - 1
    drawn = tuple(sample(int(ends[sequence])) for sequence in samples)
    return StepInput(1, tokens, query_lens, contexts, tuple(array("i", t) for t in tables), drawn)


STEPS = {
    "decodes": step_of((1, 1, 1), (0, 7, 8), [[5], [3, 0], [9, 2, 6]], (0, 1, 2)),
    "a chunk between decodes": step_of((1, 6, 1), (3, 3, 11), [[4], [7, 1, 2], [0, 3, 6]], (0, 2)),
    "a prompt, nothing drawn": step_of((9,), (0,), [[2, 5, 1]], ()),
}


@pytest.mark.parametrize(("name", "padding"), [*((name, 0) for name in STEPS), ("decodes", 1), ("decodes", 4)])
def test_a_step_is_laid_out(name: str, padding: int) -> None:
    step, size = STEPS[name], 4
    staged = Staging(CPU).open(step_shapes(step, padding))
    for values in staged.host.values():
        values[:] = 77
    write_step(step, size, staged.host)
    arrays = staged.send().arrays
    positions = [c + i for n, c in zip(step.query_lens, step.context_lens, strict=True) for i in range(n)]
    tables = [t for t, n in zip(step.block_tables, step.query_lens, strict=True) for _ in range(n)]
    slots = [table[p // size] * size + p % size for table, p in zip(tables, positions, strict=True)]
    assert arrays["token_ids"].tolist() == [*step.token_ids, *[0] * padding]
    assert arrays["positions"].tolist() == [*positions, *[0] * padding]
    assert arrays["slots"].tolist() == [*slots, *[-1] * padding]
    key_lens = [n + c for n, c in zip(step.query_lens, step.context_lens, strict=True)]
    assert arrays["key_lens"].tolist() == [*key_lens, *[0] * padding]
    starts = arrays["query_starts"].tolist()
    assert np.diff(starts).tolist() == [*step.query_lens, *[1] * padding]
    width = max(map(len, step.block_tables))
    padded = [[*t, *[0] * (width - len(t))] for t in step.block_tables]
    assert arrays["block_tables"].tolist() == padded + [[0] * width] * padding
    if not padding:
        ours, batch = (
            sequences_of(step, size, arrays).batch,
            PagedBatch.of(step.query_lens, key_lens, step.block_tables, size, CPU),
        )
        for field in vars(batch):
            assert torch.equal(torch.as_tensor(getattr(ours, field)), torch.as_tensor(getattr(batch, field))), field


@pytest.mark.parametrize("name", STEPS)
def test_rows_are_picked_where_not_all_are_drawn_from(name: str) -> None:
    step = STEPS[name]
    alone = Communicator(None, "tp")
    plan = Drawing(alone, [(0, 200)], select_ops(CPU, torch.float32), CPU, num_slots=3, longest=64).plan(step)
    staged = Staging(CPU).open(plan.shapes)
    plan.write(staged.host)
    rows = staged.send().arrays.get("rows")
    assert step.draws_after_all == (name == "decodes")
    picked = [] if step.draws_after_all else [sample.row for sample in step.samples]
    assert ([] if rows is None else rows.tolist()) == picked


def test_what_a_recording_reads_lies_first_and_is_fixed_by_the_size() -> None:
    step, other = STEPS["decodes"], step_of((1,), (30,), [list(range(9))], ())
    assert list(step_shapes(step, 1).items())[:4] == list(step_shapes(other, 3).items())[:4]
    assert list(step_shapes(step, 1).items())[:4] == list(token_shapes(4, 4).items())


def test_tokens_that_the_step_before_draws() -> None:
    token_ids = torch.tensor([8, drawn_before(2), 0, drawn_before(0)])
    assert known_tokens(token_ids, torch.tensor([50, 51, 52, 53])).tolist() == [8, 52, 0, 50]
