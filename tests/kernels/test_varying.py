"""A tape that was recorded once does what it did for fewer tokens, on other arrays."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager
from meshlm.kernels.batch import PagedBatch
from meshlm.kernels.cpu import CpuLinear, CpuOps, Extent, Pool, Tape, Unavailable, VaryingTape, recording

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 1, 16, 4
HIDDEN = HEADS * HEAD_DIM

try:
    OPS, LINEAR = CpuOps(torch.float32), CpuLinear(torch.float32)
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> None:
    """Not here: to poison is an op of torch's, of which these tapes have none."""


class Model:
    """Decoder layers of C++ ops, with a cache."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.embedding, self.norm, self.head_norm = new(50, HIDDEN), new(HIDDEN), new(HEAD_DIM)
        self.qkv, self.out, self.gate_up, self.down = (
            new(*shape) / shape[1] ** 0.5
            for shape in (
                ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
                (HIDDEN, HIDDEN),
                (2 * HIDDEN, HIDDEN),
                (HIDDEN, HIDDEN),
            )
        )
        self.cos, self.sin = new(64, HEAD_DIM // 2), new(64, HEAD_DIM // 2)
        self.caches = [torch.zeros(40, BLOCK_SIZE, KV_HEADS, HEAD_DIM) for _ in range(2)]

    def __call__(self, step: dict[str, Tensor]) -> Tensor:
        ops, linear, x = OPS, LINEAR.linear_plain, step["x"]
        total: Tensor | None = None
        for _ in range(2):
            x, total = ops.add_rms_norm(x, total, self.norm, 1e-5)
            qkv = linear(x, self.qkv, None).view(-1, HEADS + 2 * KV_HEADS, HEAD_DIM)
            query, key, value = qkv.split_with_sizes((HEADS, KV_HEADS, KV_HEADS), dim=1)
            query, _ = ops.add_rms_norm(query, None, self.head_norm, 1e-5)  # as many rows as heads a token
            query = ops.rotary_store_kv(
                query, key, value, self.cos, self.sin, step["positions"], *self.caches, step["slots"]
            )
            batch = PagedBatch(step["block_tables"], step["query_starts"], step["key_lens"], 64, 64, 1, 64)
            out = ops.paged_attention(query, *self.caches, batch, 0.25)
            x, total = ops.add_rms_norm(linear(out.view(-1, HIDDEN), self.out, None), total, self.norm, 1e-5)
            x = linear(ops.gated_activation("silu")(linear(x, self.gate_up, None)), self.down, None)
        assert total is not None
        x, total = ops.add_rms_norm(x, total, self.norm, 1e-5)
        return x


def step_of(query_lens: list[int], contexts: list[int], seed: int) -> tuple[dict[str, Tensor], Extent]:
    """Arrays of a step whose sequences have so many new tokens, and so many before."""
    key_lens = [context + count for context, count in zip(contexts, query_lens, strict=True)]
    widths = [-(-length // BLOCK_SIZE) for length in key_lens]
    generator = torch.Generator().manual_seed(seed)
    blocks = iter(torch.randperm(40, generator=generator).tolist())
    tables = torch.zeros(len(widths), max(widths), dtype=torch.int32)
    for row, width in enumerate(widths):
        tables[row, :width] = torch.tensor([next(blocks) for _ in range(width)])
    positions = [p for context, length in zip(contexts, key_lens, strict=True) for p in range(context, length)]
    owners = [row for row, count in enumerate(query_lens) for _ in range(count)]
    slots = [
        int(tables[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
        for row, p in zip(owners, positions, strict=True)
    ]
    arrays = {
        "x": torch.randn(len(positions), HIDDEN, generator=generator),
        "positions": torch.tensor(positions),
        "slots": torch.tensor(slots),
        "block_tables": tables,
        "query_starts": torch.tensor([0, *query_lens]).cumsum(0).int(),
        "key_lens": torch.tensor(key_lens, dtype=torch.int32),
    }
    return arrays, Extent(len(positions), *tables.shape)


def test_fewer_tokens_of_other_sequences_in_other_places() -> None:
    model, tape = Model(), Tape(Pool())
    step, extent = step_of([20, 9], [0, 0], seed=0)
    with recording(tape):
        out = model(step)
    varying = VaryingTape(tape, extent, step, [out, None])
    first = out.clone()
    for seed, (query_lens, contexts) in enumerate(
        [([1], [0]), ([7, 1, 1], [0, 12, 3]), ([3] * 5, [9, 8, 7, 6, 5]), ([29], [4]), ([2], [30])], start=1
    ):
        step, extent = step_of(query_lens, contexts, seed)
        before = [cache.normal_() for cache in model.caches]
        kept = [cache.clone() for cache in before]
        expected = model(step)
        stored = [cache.clone() for cache in model.caches]
        for cache, values in zip(model.caches, kept, strict=True):
            cache.copy_(values)
        replayed, nothing = varying.replay(extent, step)
        assert replayed is not None and nothing is None
        assert torch.equal(replayed, expected), "to the last bit"
        assert all(map(torch.equal, model.caches, stored)), "keys and values are where they belong, and nowhere else"
    step, extent = step_of([20, 9], [0, 0], seed=0)
    varying.replay(extent, step)
    assert torch.equal(out, first)


def test_more_tokens_than_recorded_are_no_replay() -> None:
    model, tape = Model(), Tape(Pool())
    step, extent = step_of([5], [0], seed=0)
    with recording(tape):
        out = model(step)
    varying = VaryingTape(tape, extent, step, [out])
    step, extent = step_of([6], [0], seed=0)
    with pytest.raises(AssertionError):
        varying.replay(extent, step)


WEIGHT = torch.ones(8)


def torchs_own(x: Tensor) -> Tensor:
    return OPS.add_rms_norm(x, None, WEIGHT, 1e-5)[0] * 2.0


def of_a_part(x: Tensor) -> Tensor:
    return OPS.add_rms_norm(x.view(12, 4)[6:].view(3, 8), None, WEIGHT, 1e-5)[0]


ZEROS, KEYS = torch.zeros(6), torch.zeros(6, 2, dtype=torch.int32)


def of_unsaid_rows(x: Tensor) -> Tensor:
    return OPS.sample_shard(x, ZEROS, KEYS, 0)[0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (torchs_own, "more on the tape than C\\+\\+ ops"),
        (of_a_part, "a part of x|other than so many a token"),
        (of_unsaid_rows, "does not say what of its arguments"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
    ],
)
def test_what_cannot_be_replayed_so_is_refused(function: Callable[[Tensor], object], reason: str) -> None:
    tape, x = Tape(Pool()), torch.randn(6, 8)
    with recording(tape):
        function(x)
    with pytest.raises(ValueError, match=reason):
        VaryingTape(tape, Extent(6, 1, 1), {"x": x}, [])


def test_an_output_that_is_an_input_is_refused() -> None:
    tape, x = Tape(Pool()), torch.randn(6, 8)
    with recording(tape):
        outputs = OPS.add_rms_norm(x, None, WEIGHT, 1e-5)
    assert outputs[1] is x
    with pytest.raises(ValueError, match="given is among what is made"):
        VaryingTape(tape, Extent(6, 1, 1), {"x": x}, outputs)


def test_outputs_may_have_some_rows_a_token() -> None:
    tape, x = Tape(Pool()), torch.randn(6, 8)
    with recording(tape):
        out, _ = OPS.add_rms_norm(x.view(12, 4), None, WEIGHT[:4], 1e-5)
    varying = VaryingTape(tape, Extent(6, 1, 1), {"x": x}, [out])
    y = torch.randn(2, 8)
    (replayed,) = varying.replay(Extent(2, 1, 1), {"x": y})
    assert replayed is not None and torch.equal(replayed, OPS.add_rms_norm(y.view(4, 4), None, WEIGHT[:4], 1e-5)[0])


def test_a_tape_of_calls_only_keeps_nothing_once_there_is_more() -> None:
    tape, x, norm = Tape(Pool(), calls_only=True), torch.randn(6, 8), torch.ones(8)
    with recording(tape):
        y, _ = OPS.add_rms_norm(x, None, norm, 1e-5)
        assert y.data_ptr() and tape._calls
        z = y * 2.0
        lent = sum(map(len, tape.pool._free.values()))
        for _ in range(5):
            z, _ = OPS.add_rms_norm(z + 1.0, None, norm, 1e-5)
    assert tape.spoiled == "there is more on the tape than C++ ops" and not tape.is_one_call
    assert tape._parts == [] and tape._calls == []
    assert sum(map(len, tape.pool._free.values())) == lent, "what came after has no memory of the pool's"
    expected, _ = eager.add_rms_norm(x, None, norm, 1e-5)
    expected = expected * 2.0
    for _ in range(5):
        expected, _ = eager.add_rms_norm(expected + 1.0, None, norm, 1e-5)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


def test_a_call_that_fails_ends_the_replay_and_tells() -> None:
    status = [0]
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda arguments: status[0])
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    tape, x, told = Tape(Pool()), torch.randn(2, 8), []
    with recording(tape):
        tape.call(address, "pnl", (0, 16, 2**62), told.append)
        out, _ = OPS.add_rms_norm(x, None, WEIGHT, 1e-5)
    assert tape.is_one_call
    tape.replay()
    before = out.clone()
    x.normal_()
    status[0] = 3
    tape.replay()
    assert told == [3] and torch.equal(out, before), "what comes after is not done"
    status[0] = 0
    tape.replay()
    assert told == [3] and not torch.equal(out, before)
