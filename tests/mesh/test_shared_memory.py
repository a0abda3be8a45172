"""SharedMemory: what the tests of Communicator do not come to. Ranks are threads here, which it cannot tell."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import Any, TypeVar

import pytest
import torch

from meshlm.config.native import CompileError
from meshlm.mesh import shared_memory
from meshlm.mesh.shared_memory import SharedMemory, SharedMemoryError, opened

T = TypeVar("T")
SLOT = shared_memory._SLOT_BYTES

try:
    shared_memory.library()
except CompileError as reason:  # gloo does it all then
    pytest.skip(str(reason), allow_module_level=True)


class Meeting:
    """Gathers what each of several threads brings."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._brought: list[Any] = [None] * size

    def gather(self, rank: int, mine: Any) -> list[Any]:
        self._brought[rank] = mine
        self._barrier.wait(10)
        brought = list(self._brought)
        self._barrier.wait(10)
        return brought


def on_each(size: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(work, range(size)))


def group_of(size: int, timeout_s: float | None = 10, crowded: bool = True) -> list[SharedMemory]:
    meeting = Meeting(size)

    def join(rank: int) -> SharedMemory | str:
        return opened(rank, size, lambda mine: meeting.gather(rank, mine), crowded=crowded, timeout_s=timeout_s)

    found = on_each(size, join)
    assert all(isinstance(each, SharedMemory) for each in found), found
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module", params=[2, 3])
def group(request: pytest.FixtureRequest) -> list[SharedMemory]:
    return group_of(request.param)


@pytest.mark.parametrize("num_bytes", [0, 4, 4 * 4095, 4 * 4096, SLOT - 4, SLOT, SLOT + 4, 3 * SLOT + 400])
def test_every_size(num_bytes: int, group: list[SharedMemory]) -> None:
    """In one round or several, each rank summing all or its part."""
    size, count = len(group), num_bytes // 4
    inputs = [torch.randn(count, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]

    def work(rank: int) -> tuple[torch.Tensor, ...]:
        total, copy, gathered = inputs[rank].clone(), inputs[rank].clone(), torch.empty(size, count)
        group[rank].all_reduce(total, "sum")
        group[rank].all_gather(inputs[rank], gathered)
        group[rank].broadcast(copy, size - 1)
        group[rank].barrier()
        return total, gathered, copy

    for total, gathered, copy in on_each(size, work):
        torch.testing.assert_close(total, torch.stack(inputs).sum(0))
        assert torch.equal(gathered, torch.stack(inputs))
        assert torch.equal(copy, inputs[-1])


@pytest.mark.parametrize("dtype", shared_memory.REDUCED, ids=str)
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_rounded_once(dtype: torch.dtype, op: str, group: list[SharedMemory]) -> None:
    size = len(group)
    wide = torch.randn(size, 1000, generator=torch.Generator().manual_seed(1)) * 100
    inputs = wide.to(dtype)
    exact = inputs.double() if dtype.is_floating_point else inputs
    expected = {"sum": lambda: exact.sum(0), "max": lambda: exact.amax(0), "min": lambda: exact.amin(0)}[op]()

    def work(rank: int) -> torch.Tensor:
        tensor = inputs[rank].clone()
        assert group[rank].reduces(dtype)
        group[rank].all_reduce(tensor, op)
        return tensor

    for found in on_each(size, work):
        if dtype is torch.float32 and op == "sum":
            torch.testing.assert_close(found, expected.float())  # three are summed one by one
        else:
            assert torch.equal(found, expected.to(dtype))


def test_not_a_number_is_passed_on(group: list[SharedMemory]) -> None:
    def work(rank: int) -> list[torch.Tensor]:
        found = []
        for op in ("sum", "max", "min"):
            for dtype in (torch.float32, torch.bfloat16):
                tensor = torch.tensor([float("nan") if rank == column else 1.0 for column in range(4)], dtype=dtype)
                group[rank].all_reduce(tensor, op)
                found.append(tensor)
        return found

    size = len(group)
    for tensors in on_each(size, work):
        assert all(tensor.isnan().tolist() == [column < size for column in range(4)] for tensor in tensors)


def test_many_letters_arrive_in_order(group: list[SharedMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a mailbox takes at once, in number and in bytes, to a reader that is now late and now waiting."""
    monkeypatch.setattr(shared_memory, "_BOX_BYTES", 1 << 20)
    size = len(group)
    pair = group_of(size)
    letters = [torch.full((1 + 7919 * i % 200_000,), float(i)) for i in range(200)]

    def work(rank: int) -> bool:
        if rank == 0:
            for letter in letters:
                pair[0].send(letter, 1)
            return True
        if rank == 1:
            time.sleep(0.05)
            for letter in letters:
                found = torch.empty_like(letter)
                pair[1].receive(found, 0)
                if not torch.equal(found, letter):
                    return False
        return True

    assert on_each(size, work) == [True] * size


@pytest.mark.parametrize(("unread", "sizes"), [(3, 1), (3, 400), (60, 1), (60, 20), (1, 1300)], ids=str)
def test_a_mailbox_that_is_never_empty_goes_on(
    unread: int, sizes: int, group: list[SharedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may leave some letters lying, always: a sender waits for no room that there is."""
    monkeypatch.setattr(shared_memory, "_BOX_BYTES", 1 << 14)
    size = len(group)
    pair = group_of(size)
    letters = [torch.full((5 + 97 * i % sizes,), float(i)) for i in range(2000)]

    def work(rank: int) -> bool:
        if rank:
            return True
        for number, letter in enumerate(letters):  # one thread writes and reads: nobody else could make room
            pair[0].send(letter, 1)
            if number >= unread:
                found = torch.empty_like(letters[number - unread])
                pair[1].receive(found, 0)
                if not torch.equal(found, letters[number - unread]):
                    return False
        return True

    assert on_each(size, work) == [True] * size


def test_nobody_runs_ahead(group: list[SharedMemory]) -> None:
    """A rank that is slow at any moment still finds what belongs to its own collective."""
    size = len(group)

    def work(rank: int) -> bool:
        noise = torch.Generator().manual_seed(rank)
        for number in range(300):
            if torch.rand((), generator=noise) < 0.02:
                time.sleep(0.001)
            tensor = torch.full((8,), float(number * (rank + 1)))
            if number % 3 == 0:
                group[rank].broadcast(tensor, number % size)
                expected = float(number * (number % size + 1))
            else:
                group[rank].all_reduce(tensor, "sum")
                expected = float(number * sum(range(size + 1)))
            if not bool((tensor == expected).all()):
                return False
        return True

    assert on_each(size, work) == [True] * size


def test_different_sizes_are_a_mistake_on_every_rank() -> None:
    group = group_of(2)

    def work(rank: int) -> str:
        with pytest.raises(SharedMemoryError) as error:
            group[rank].all_reduce(torch.zeros(2 + rank), "sum")
        return str(error.value)

    assert on_each(2, work) == [f"position {peer} brings something of another size" for peer in (1, 0)]


def test_who_does_not_come_and_who_leaves() -> None:
    group = group_of(2, timeout_s=0.2)
    with pytest.raises(SharedMemoryError, match=r"^Timed out waiting for position 1$"):
        group[0].barrier()
    with pytest.raises(SharedMemoryError, match="cannot be used any more: Timed out waiting for position 1"):
        group[0].all_reduce(torch.zeros(2), "sum")

    waits: list[Callable[[SharedMemory], None]] = [lambda own: own.receive(torch.zeros(2), 1), SharedMemory.barrier]
    for wait in waits:
        stays, leaves = group_of(2, timeout_s=None)
        threading.Timer(0.1, leaves.close).start()
        began = time.monotonic()
        with pytest.raises(SharedMemoryError, match=r"^position 1 has ended$"):
            wait(stays)
        assert time.monotonic() - began < 5


class Noted:
    """A Recorder that calls again when it is told to."""

    def do(self, function: Callable[[], object], /) -> None:
        raise AssertionError("it is a call")

    def call(self, function: int, signature: str, arguments: tuple[Any, ...], failed: Callable[[int], object]) -> None:
        self._function, self._failed = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(function), failed
        self._arguments = (ctypes.c_int64 * len(arguments))(*arguments)

    def again(self) -> None:
        status = self._function(ctypes.addressof(self._arguments))
        if status:
            self._failed(status)


def test_recorded_it_is_done_again_until_it_fails_and_never_after() -> None:
    group = group_of(2, timeout_s=0.2)
    tensors, tapes = [torch.full((3,), 1.0 + rank) for rank in range(2)], [Noted(), Noted()]
    for shared, tensor, tape in zip(group, tensors, tapes, strict=True):
        shared.record_all_reduce(tape, tensor, "sum", shared.fail)
    on_each(2, lambda rank: tapes[rank].again())
    assert [tensor.tolist() for tensor in tensors] == [[3.0] * 3] * 2
    with pytest.raises(SharedMemoryError, match=r"^Timed out waiting for position 1$"):
        tapes[0].again()
    began = time.monotonic()
    with pytest.raises(SharedMemoryError, match=r"^Timed out waiting for position 1$"):
        tapes[0].again()  # it does not begin: the other's next would be taken for that of the first
    assert time.monotonic() - began < 0.1
    assert tensors[0].tolist() == [3.0] * 3


def test_what_is_recorded_is_not_done_after_any_other_failure() -> None:
    group, tape = group_of(2, timeout_s=5), Noted()
    group[0].record_all_reduce(tape, torch.zeros(3), "sum", group[0].fail)
    group[1].send(torch.zeros(4), 0)
    with pytest.raises(SharedMemoryError, match="another size"):
        group[0].receive(torch.zeros(3), 1)
    began = time.monotonic()
    with pytest.raises(SharedMemoryError, match="another size"):
        tape.again()
    assert time.monotonic() - began < 1


@contextmanager
def another_process(work: Callable[[], None]) -> Iterator[int]:
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_peer_that_is_killed_and_what_is_left_of_it() -> None:
    """Also as a zombie, whom nobody has reaped yet."""
    ends = Pipe()

    def gather(rank: int, mine: Any) -> list[Any]:
        ends[rank].send(mine)
        other = ends[rank].recv()
        return [mine, other] if rank == 0 else [other, mine]

    def join(rank: int) -> SharedMemory:
        found = opened(rank, 2, lambda mine: gather(rank, mine), crowded=False, timeout_s=60)
        assert isinstance(found, SharedMemory)
        return found

    def peer() -> None:
        shared = join(1)
        shared.barrier()
        time.sleep(60)

    with another_process(peer) as pid:
        shared = join(0)
        shared.barrier()
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(SharedMemoryError, match=r"^position 1 has ended$"):
            shared.all_reduce(torch.zeros(100), "sum")
        assert time.monotonic() - began < 5
    assert not [name for name in os.listdir("/dev/shm") if "meshlm" in name]


def test_who_cannot_share_says_why_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on two hosts, where the first one's /proc is another."""
    meeting = Meeting(2)

    def join(rank: int) -> SharedMemory | str:
        def gather(mine: Any) -> list[Any]:
            told = meeting.gather(rank, mine)
            if rank == 1 and isinstance(told[0], tuple):
                told[0] = (*told[0][:1], os.getpid(), 2**20, *told[0][3:])
            return told

        return opened(rank, 2, gather, crowded=True, timeout_s=1)

    expected = "rank at position 1 cannot open the memory of the one at 0: No such file or directory"
    assert on_each(2, join) == [expected] * 2

    def refuse() -> Any:
        raise CompileError("no C++ compiler is installed")

    monkeypatch.setattr(shared_memory, "library", refuse)
    assert on_each(2, join) == ["no C++ compiler is installed"] * 2
