"""Messages between the driver and a rank: a `Connection`, and beside it, where both are on one host, shared memory.

Messages then go through two rings (`channel.cpp`), one each way, and the connection is their bell: who finds nothing
waits a moment, yielding its core, and then sleeps on the connection, where whoever has put something next rings. So
a wait is an ordinary one for a readable descriptor, which may stand among others, and the end of a process is noticed
as the connection's end. What is too long for a ring goes by the connection, and the ring says so.

The memory is as `shared_memory` has it: without a name, opened through /proc. Where that cannot be, all goes by the
connection.
"""

import ctypes
import mmap
import os
import pickle
import secrets
import selectors
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import reduction
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ..config.native import CompileError
from .shared_memory import TOKEN_BYTES, library, mapped

_CAPACITY = 256 << 10  # bytes of a ring
_LONGEST = _CAPACITY // 4  # message that goes through it
_BY_CONNECTION, _NOTHING = -1, -2  # lengths that are none
_PATIENCE_NS = 1_000_000  # longer than the driver takes between two steps
_FULL_S = 0.001  # between two looks whether there is room again

Offer = tuple[str, bytes] | None
"""Where a channel's memory is, and its last bytes."""


class Channel:
    """One end of messages both ways; as a `Connection`, and not thread-safe either."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._memory: mmap.mmap | None = None  # offered, perhaps not shared
        self._file = -1  # by which the other end opens it
        self._base: Any = None  # keeps the mapping
        self._outward = self._inward = 0  # addresses of the rings; 0: not shared
        self._ring_next: Callable[[int, int, int], int]  # once it is shared
        self._patience_ns = 0  # how long `recv` keeps its thread awake
        self._has_ended = False

    @property
    def is_shared(self) -> bool:
        return bool(self._inward)

    # ---- sharing ------------------------------------------------------------------------------------------------

    def offer(self) -> Offer:
        """Memory for the other end to `accept`; None where it cannot be made."""
        token = secrets.token_bytes(TOKEN_BYTES)
        try:
            size = 2 * _rings().ring_bytes(_CAPACITY) + TOKEN_BYTES
            self._file = file = os.memfd_create("meshlm-channel", os.MFD_CLOEXEC)
            os.ftruncate(file, size)
            os.pwrite(file, token, size - TOKEN_BYTES)
            self._memory = mmap.mmap(file, size)
        except (CompileError, OSError, AttributeError):
            return None
        return f"/proc/{os.getpid()}/fd/{file}", token

    def accept(self, offer: Offer, is_crowded: bool) -> bool:
        """Whether this end can share what the other has offered, and now does.

        is_crowded: whether a core is too dear to wait on.
        """
        if offer is None:
            return False
        try:
            _rings()
            self._memory = mapped(*offer)
        except (CompileError, OSError):
            return False
        self._open(is_maker=False)
        self._patience_ns = 0 if is_crowded else _PATIENCE_NS
        return True

    def share(self, is_accepted: bool) -> None:
        """What the other end says to the offer."""
        if is_accepted:
            self._open(is_maker=True)
        self._close_file()

    def _open(self, is_maker: bool) -> None:
        assert self._memory is not None
        self._base = ctypes.c_char.from_buffer(self._memory)
        first = ctypes.addressof(self._base)
        second = first + _rings().ring_bytes(_CAPACITY)
        self._outward, self._inward = (first, second) if is_maker else (second, first)
        self._ring_next = _rings().ring_next

    # ---- messages -----------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        self.send_bytes(reduction.ForkingPickler.dumps(message))

    def send_bytes(self, data: Any) -> None:
        """Raises OSError if the other end has gone, as far as that is known."""
        if not self.is_shared:
            self.connection.send_bytes(data)
        elif len(data) <= _LONGEST:
            self._put(bytes(data), len(data))
        else:
            self._put(b"", _BY_CONNECTION)
            self.connection.send_bytes(data)

    def _put(self, data: bytes, length: int) -> None:
        while (rings := _rings().ring_put(self._outward, data, length, _CAPACITY)) < 0:
            self._ring()  # raises once nobody is there who would make room
            time.sleep(_FULL_S)
        if rings:
            self._ring()

    def _ring(self) -> None:
        self.connection.send_bytes(b"")

    def recv(self) -> Any:
        """The next message; EOFError or OSError when the other end has gone and all it said is heard."""
        if not self.is_shared:
            return self.connection.recv()
        patience_ns = self._patience_ns
        while (length := self._next(patience_ns)) == _NOTHING:
            if self._has_ended:
                raise EOFError
            self.fall_asleep()
            if self._next() == _NOTHING:
                self._hear_bell()
            patience_ns = 0
        data = bytearray(max(0, length))
        address = ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data)) if data else None
        _rings().ring_take(self._inward, address, length, _CAPACITY)
        while length == _BY_CONNECTION:
            data = bytearray(self.connection.recv_bytes())
            if data:  # else it is a bell
                break
        return pickle.loads(data)

    def poll(self) -> bool:
        """Whether `recv` would not wait."""
        if not self.is_shared:
            return self.connection.poll()
        while not (found := self.has_letter or self._has_ended) and self.connection.poll():
            if not self.has_letter:  # else what the connection has may be more than a bell
                self._hear_bell()
        return found

    @property
    def has_letter(self) -> bool:
        """Whether something is in the ring."""
        return self.is_shared and self._next() != _NOTHING

    def fall_asleep(self) -> None:
        """From here on the connection becomes readable when something comes that `has_letter` does not show now."""
        if self.is_shared:
            _rings().ring_sleep(self._inward)

    def wake_up(self) -> bool:
        """Once the connection is readable: whether there is something, rather than a bell that was rung too late."""
        if not self.is_shared:
            return True
        length = self._next()
        if length != _BY_CONNECTION:  # else what is there may be more than a bell
            self._hear_bell()
        return length != _NOTHING or self.has_letter or self._has_ended

    def _next(self, patience_ns: int = 0) -> int:
        return self._ring_next(self._inward, _CAPACITY, patience_ns)

    def _hear_bell(self) -> None:
        """Waits for it, or for the connection's end."""
        try:
            self.connection.recv_bytes()
        except (EOFError, OSError):
            self._has_ended = True  # what it said before is in the ring

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def close(self) -> None:
        self._close_file()
        self.connection.close()

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Inbox:
    """Waits for whichever of several channels has something; it sleeps at once, for ranks need the cores."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = dict(enumerate(channels))
        self._selector = selectors.DefaultSelector()
        for position, channel in self._channels.items():
            self._selector.register(channel.connection, selectors.EVENT_READ, position)

    def wait(self, timeout_s: float | None) -> list[int]:
        """Positions of channels whose `recv` does not wait; none when the time is up."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (found := self._with_letters()):
            for channel in self._channels.values():
                channel.fall_asleep()
            if found := self._with_letters():
                break
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._selector.select(left)
            if not events or (found := [key.data for key, _ in events if self._channels[key.data].wake_up()]):
                break
        return found

    def _with_letters(self) -> list[int]:
        return [position for position, channel in self._channels.items() if channel.has_letter]

    def drop(self, position: int) -> None:
        """Waits for this one no more."""
        self._selector.unregister(self._channels.pop(position).connection)

    def close(self) -> None:
        self._selector.close()


@cache
def _rings() -> ctypes.CDLL:
    """Raises CompileError or OSError."""
    found = library()
    pointer, long = ctypes.c_void_p, ctypes.c_long
    signatures: dict[str, tuple[Any, ...]] = {
        "ring_bytes": (long,),
        "ring_put": (pointer, ctypes.c_char_p, long, long),
        "ring_next": (pointer, long, long),
        "ring_take": (pointer, pointer, long, long),
        "ring_sleep": (pointer,),
    }
    for name, types in signatures.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, long
    found.ring_take.restype = found.ring_sleep.restype = None
    return found
