"""Collectives through memory that the ranks of one host share (`shared_memory.cpp`), where gloo would use sockets.

The memory belongs to an anonymous file (memfd): it has no name that could be left behind, and is gone with the last
process that has mapped it, however that ends. One rank makes it; the others open it through that rank's /proc entry,
which works on the same host, in the same container, as the same user, and so also tells whether they are that.

A peer that dies is noticed by its pidfd within 50 ms; one that leaves says so.
"""

import ctypes
import mmap
import os
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from ..config.native import CompileError, compiled

REDUCED = {  # what can be reduced; whatever has bytes can be copied
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
}
_OPERATIONS = {"sum": 0, "max": 1, "min": 2}
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-w")
_SLOT_BYTES = 512 << 10  # what a rank brings to one round of a collective
_BOX_BYTES = 64 << 20  # what can be under way to a peer that is late; touched bit by bit while it is never empty
TOKEN_BYTES = 16
_SPIN_NS, _SPIN_CROWDED_NS = 200_000, 0  # of a wait, with a core for each rank and without


class Recorder(Protocol):
    """What notes what is done, so that it can be done again."""

    def do(self, function: Callable[[], object], /) -> None:
        """By calling this."""

    def call(
        self, function: int, signature: str, arguments: tuple[Any, ...], failed: Callable[[int], object], /
    ) -> None:
        """By calling the `int(const int64_t* arguments)` at this address.

        signature: a letter for each argument: p pointer, i int, l long, n long that counts elements of rows of which
        there may be others then. failed: called with what it gives, unless that is 0.
        """


class SharedMemoryError(RuntimeError):
    """A collective in vain; one line."""


class SharedMemory:
    """What the ranks of a group share; `rank` and peers are positions in it. See `opened`."""

    def __init__(self, memory: mmap.mmap, rank: int, pids: list[int], crowded: bool, timeout_s: float | None) -> None:
        self._memory, self._library = memory, library()
        self.rank, self.size = rank, len(pids)
        self._timeout_ns = 2**62 if timeout_s is None else round(timeout_s * 1e9)
        self._broken: str | None = None
        self._processes = [-1 if peer == rank else os.pidfd_open(pid) for peer, pid in enumerate(pids)]
        self._state = ctypes.create_string_buffer(self._library.shm_group_bytes())
        self._group = ctypes.addressof(self._state)
        self._base = ctypes.c_char.from_buffer(memory)
        self._library.shm_open(
            self._group,
            ctypes.addressof(self._base),
            rank,
            self.size,
            _SLOT_BYTES,
            _BOX_BYTES,
            (ctypes.c_int * self.size)(*self._processes),
            _SPIN_CROWDED_NS if crowded else _SPIN_NS,
        )
        self._left = False
        self.tape: Recorder | None = None  # see `Communicator.record_on`
        self._all_reduce = self._library.shm_all_reduce
        has_half = bool(self._library.shm_has_half())
        self._reduced = {d: code for d, code in REDUCED.items() if has_half or d is not torch.float16}

    def reduces(self, dtype: torch.dtype) -> bool:
        return dtype in self._reduced

    # Tensors are contiguous and on the CPU. All raise SharedMemoryError.

    def all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        self._check_sound()
        code, count = self._reduced[tensor.dtype], tensor.numel()
        status = self._all_reduce(self._group, code, _OPERATIONS[op], tensor.data_ptr(), count, self._timeout_ns)
        if status:
            self.fail(status)

    def record_all_reduce(self, tape: Recorder, tensor: torch.Tensor, op: str, failed: Callable[[int], object]) -> None:
        """Lets the tape do it again by a call of its own, as far as nothing fails: then `failed` is to `fail`."""
        code, count = self._reduced[tensor.dtype], tensor.numel()
        function = ctypes.cast(self._library.shm_all_reduce_call, ctypes.c_void_p).value
        assert function is not None
        arguments = (self._group, code, _OPERATIONS[op], tensor.data_ptr(), count, self._timeout_ns)
        tape.call(function, "piipnl", arguments, failed)

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor) -> None:
        self._do(self._library.shm_all_gather, tensor.data_ptr(), gathered.data_ptr(), tensor.nbytes)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        if not 0 <= src < self.size:
            raise SharedMemoryError(f"positions are 0 to {self.size - 1}")
        self._do(self._library.shm_broadcast, tensor.data_ptr(), tensor.nbytes, src)

    def barrier(self) -> None:
        self._do(self._library.shm_barrier)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Returns when the tensor has been copied, which waits for the peer only while very much is under way."""
        self._do(self._library.shm_send, tensor.data_ptr(), tensor.nbytes, dst)

    def receive(self, tensor: torch.Tensor, src: int) -> None:
        self._do(self._library.shm_receive, tensor.data_ptr(), tensor.nbytes, src)

    def close(self) -> None:
        """Peers that wait for this rank wait no longer. The memory stays as long as anyone still uses this object."""
        if not self._left:
            self._left, self._broken = True, "it was closed"
            self._library.shm_leave(self._group)

    def __del__(self) -> None:
        if hasattr(self, "_left"):
            self.close()
        for descriptor in getattr(self, "_processes", ()):
            if descriptor >= 0:
                os.close(descriptor)

    def _do(self, function: Callable[..., int], *arguments: Any) -> None:
        self._check_sound()
        status = function(self._group, *arguments, self._timeout_ns)
        if status:
            self.fail(status)

    def _check_sound(self) -> None:
        if self._broken is not None:
            raise SharedMemoryError(f"the group cannot be used any more: {self._broken}")

    def fail(self, status: int) -> NoReturn:
        """What a status of the library's, but 0, means. The group is broken then."""
        peer = self._library.shm_failed_at(self._group)
        reason = {
            1: f"Timed out waiting for position {peer}",
            2: f"position {peer} has ended",
            3: f"position {peer} brings something of another size",
        }[status]
        self._broken = reason
        raise SharedMemoryError(reason)


def opened(
    rank: int,
    size: int,
    everybodys: Callable[[Any], list[Any]],
    *,
    crowded: bool,
    timeout_s: float | None,
) -> SharedMemory | str:
    """The memory that a group's ranks share, or why they cannot; collective, and all come to the same.

    everybodys: gathers an object of each rank. crowded: there are more ranks than cores, so that waiting must not keep
    one busy.
    """
    file = -1
    memory: mmap.mmap | None = None
    try:
        try:
            compiled_here, reason = library(), None
            token = secrets.token_bytes(TOKEN_BYTES)
            if rank == 0:
                file = os.memfd_create("meshlm-group", os.MFD_CLOEXEC)
                os.ftruncate(file, compiled_here.shm_total_bytes(size, _SLOT_BYTES, _BOX_BYTES) + TOKEN_BYTES)
                os.pwrite(file, token, os.fstat(file).st_size - TOKEN_BYTES)
        except (CompileError, OSError, AttributeError) as error:
            reason = str(error)
        told = everybodys((reason, os.getpid(), file, token if reason is None else b""))
        reason = next((each[0] for each in told if each[0] is not None), None)
        if reason is None:
            _, maker, number, token = told[0]
            try:
                memory = mapped(f"/proc/{maker}/fd/{number}", token)
            except OSError as error:
                reason = f"rank at position {rank} cannot open the memory of the one at 0: {error.strerror}"
        reason = next((each for each in everybodys(reason) if each is not None), None)
    finally:
        if file >= 0:  # all have opened it, or nobody will
            os.close(file)
    if reason is not None or memory is None:
        return str(reason)
    return SharedMemory(memory, rank, [each[1] for each in told], crowded, timeout_s)


def mapped(path: str, token: bytes) -> mmap.mmap:
    """The whole file. Raises OSError, also if another process has that number here, and so another file."""
    file = os.open(path, os.O_RDWR)
    try:
        memory = mmap.mmap(file, os.fstat(file).st_size)
    except ValueError as error:
        raise OSError(0, str(error)) from None
    finally:
        os.close(file)
    if memory[-TOKEN_BYTES:] != token:
        raise OSError(0, "it is another file")
    return memory


@cache
def library() -> ctypes.CDLL:
    """Raises CompileError or OSError."""
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    found = ctypes.CDLL(str(compiled("shared-memory", "what ranks of one host communicate by (once)", sources, _FLAGS)))
    pointer, long, integer = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    signatures: dict[str, tuple[Any, ...]] = {
        "shm_open": (pointer, pointer, integer, integer, long, long, pointer, long),
        "shm_leave": (pointer,),
        "shm_failed_at": (pointer,),
        "shm_total_bytes": (integer, long, long),
        "shm_all_reduce": (pointer, integer, integer, pointer, long, long),
        "shm_all_gather": (pointer, pointer, pointer, long, long),
        "shm_broadcast": (pointer, pointer, long, integer, long),
        "shm_barrier": (pointer, long),
        "shm_send": (pointer, pointer, long, integer, long),
        "shm_receive": (pointer, pointer, long, integer, long),
    }
    for name, types in signatures.items():
        getattr(found, name).argtypes = types
    found.shm_group_bytes.restype = found.shm_total_bytes.restype = long
    return found
