"""What is recorded on the CPU is done again, on what its inputs hold then."""

import gc
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshlm.kernels import eager
from meshlm.kernels.cpu import CpuLinear, CpuOps, Pool, Tape, Unavailable, recording


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    try:
        return CpuOps(torch.float32)
    except Unavailable as reason:
        pytest.skip(str(reason))


def layer(ops: CpuOps, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    """Ops of our own and of torch's, views, new memory, and something done in place."""
    y, total = ops.add_rms_norm(x, x, norm, 1e-5)
    gate = ops.gated_activation("silu")(CpuLinear(torch.float32).linear_plain(y, weight, None))
    first, second = gate.split(4, dim=1)
    gate = torch.cat([second, first], dim=1) * 2.0
    gate[0].add_(1.0)
    return gate + total


def plain(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    y, total = eager.add_rms_norm(x, x, norm, 1e-5)
    gate = eager.gated_activation("silu")(F.linear(y, weight))
    gate = torch.cat([gate[:, 4:], gate[:, :4]], dim=1) * 2.0
    gate[0] += 1.0
    return gate + total


def test_a_replay_computes_from_what_the_inputs_hold_then(ops: CpuOps) -> None:
    x, norm, weight, out = torch.randn(3, 8), torch.randn(8), torch.randn(16, 8), torch.empty(3, 8)
    tape = Tape(Pool())
    with recording(tape):
        h = x
        for _ in range(3):
            h = layer(ops, h, norm, weight)
        out.copy_(h)
    del h
    gc.collect()
    assert tape.spoiled is None
    for _ in range(3):
        expected = x
        for _ in range(3):
            expected = plain(expected, norm, weight)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        x.normal_(), norm.normal_(), out.zero_()
        tape.replay()
    assert not out.eq(0).all()


def test_memory_that_is_free_is_used_again_and_what_is_kept_is_not() -> None:
    pool = Pool()
    first = pool.empty((4, 5), torch.float32)
    address, kept = first.data_ptr(), first[1:].view(-1)
    del first
    second = pool.empty((5, 4), torch.float32)
    assert address % 64 == 0 and second.data_ptr() != address  # a view keeps it
    del kept
    assert pool.empty((20,), torch.float32).data_ptr() == address
    assert pool.empty((0, 3), torch.float32).shape == (0, 3)


def test_recordings_that_share_a_pool_do_not_disturb_each_other(ops: CpuOps) -> None:
    norm, weight, pool = torch.randn(8), torch.randn(16, 8), Pool()
    inputs, outs, tapes = [torch.randn(n, 8) for n in (1, 5)], [torch.empty(n, 8) for n in (1, 5)], []
    for x, out in zip(inputs, outs, strict=True):
        tapes.append(Tape(pool))
        with recording(tapes[-1]):
            out.copy_(layer(ops, layer(ops, x, norm, weight), norm, weight))
    for _ in range(2):
        for x, out, tape in zip(inputs, outs, tapes, strict=True):
            x.normal_()
            tape.replay()
            torch.testing.assert_close(out, plain(plain(x, norm, weight), norm, weight), rtol=1e-4, atol=1e-4)


def test_what_python_reads_spoils_a_tape() -> None:
    tape, x = Tape(Pool()), torch.ones(3)
    with recording(tape):
        x.sum().item()
    assert tape.spoiled is not None and "_local_scalar_dense" in tape.spoiled


def test_a_collective_that_the_tape_was_not_given_spoils_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tape, x = Tape(Pool()), torch.ones(3)
        with recording(tape):
            dist.all_reduce(x)
    finally:
        dist.destroy_process_group()
    assert tape.spoiled is not None and "collective" in tape.spoiled


def test_others_threads_are_not_recorded(ops: CpuOps) -> None:
    tape, x, weight = Tape(Pool()), torch.ones(1, 8), torch.ones(8, 8)
    other = threading.Thread(target=CpuLinear(torch.float32).linear_plain, args=(x, weight, None))
    with recording(tape):
        other.start()
        other.join()
    assert tape._parts == []


def test_what_is_done_in_between_keeps_its_place(ops: CpuOps) -> None:
    """As a collective does."""
    tape, x, out, eye = Tape(Pool()), torch.ones(1, 8), torch.empty(1, 8), torch.eye(8)
    with recording(tape):
        y = CpuLinear(torch.float32).linear_plain(x, eye, None)
        ops_between = lambda: y.data.mul_(3)  # noqa: E731
        with torch._C._DisableTorchDispatch():
            ops_between()
        tape.do(ops_between)
        out.copy_(CpuLinear(torch.float32).linear_plain(y, eye, None))
    assert out.tolist() == [[3.0] * 8]
    x.fill_(2)
    tape.replay()
    assert out.tolist() == [[6.0] * 8]
