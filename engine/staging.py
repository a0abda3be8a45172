"""The way of a step's numbers to the device: one buffer on the host, one copy that nobody waits for.

    host     [ token_ids | positions | slots | key_lens | ... ]     pinned; written by numpy
                   one asynchronous copy
    device   [ token_ids | positions | slots | key_lens | ... ]     one buffer for all steps, read as typed views

What is queued on a device runs in its order: the copy of a step waits for the kernels of the step before, so that the
device's buffer is there to be written again. The host's is not until its copy is done, hence a ring of them. A CPU
needs none of this: the step computes from the memory that was written, which is new for each step.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Arrays that lie one after the other, by name."""

_ALIGNMENT = 64  # bytes: kernels are compiled anew for pointers that are aligned less
_RING = 4  # steps that may be on their way before the host waits
_NUMPY: dict[torch.dtype, Any] = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class Event(Protocol):
    """What of `torch.cuda.Event` is used here."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


def num_bytes(shapes: Shapes) -> int:
    """What these arrays take together."""
    return sum(_padded(dtype.itemsize * prod(shape)) for dtype, shape in shapes.values())


def views(buffer: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The arrays in a buffer of bytes."""
    found, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * prod(shape)
        found[name] = buffer[start : start + size].view(dtype).view(shape)
        start += _padded(size)
    return found


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class HostBuffer:
    """Bytes on the host that are copied to a device."""

    memory: Tensor  # uint8, pinned
    copied: Event


class HostRing:
    """Gives out host buffers, none of which is overwritten while its copy is under way.

    allocate: memory of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor], new_event: Callable[[], Event]) -> None:
        self._allocate, self._new_event = allocate, new_event
        self._buffers: deque[HostBuffer] = deque()  # in the order in which they were given out

    def take(self, size: int) -> HostBuffer:
        """A buffer of at least `size` bytes, until `copied`, which the caller records, has come about."""
        buffer = None
        if self._buffers and (len(self._buffers) == _RING or self._buffers[0].copied.query()):
            buffer = self._buffers.popleft()
            buffer.copied.synchronize()
        if buffer is None or len(buffer.memory) < size:
            buffer = HostBuffer(self._allocate(_grown(size)), self._new_event())
        self._buffers.append(buffer)
        return buffer


def _grown(size: int) -> int:
    """So much that a batch which grows slowly needs no new memory at each step."""
    return 1 << max(12, (size - 1).bit_length())


class Staged:
    """A step's arrays: to be filled on the host, then sent."""

    def __init__(self, memory: Tensor, shapes: Shapes, send: Callable[[], Tensor]) -> None:
        self._memory, self._shapes, self._send, data = memory, shapes, send, memory.numpy()
        self.host: dict[str, Any] = {}  # numpy, not initialised
        start = 0
        for name, (dtype, shape) in shapes.items():
            size = dtype.itemsize * prod(shape)
            self.host[name] = data[start : start + size].view(_NUMPY[dtype]).reshape(shape)
            start += _padded(size)

    def send(self) -> "Sent":
        buffer = self._send()
        if buffer is self._memory:  # nothing had to be copied
            return Sent(buffer, {name: torch.from_numpy(array) for name, array in self.host.items()})
        return Sent(buffer, views(buffer, self._shapes))


@dataclass(frozen=True)
class Sent:
    """A step's arrays on the device, until the next step's come."""

    buffer: Tensor  # uint8: all of them
    arrays: dict[str, Tensor]


_NOTHING = Staged(torch.empty(0, dtype=torch.uint8), {}, lambda: torch.empty(0, dtype=torch.uint8))


class Staging:
    """Brings arrays from the host to a device, step after step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring: HostRing | None = None
        self._on_device = torch.empty(0, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            self._ring = HostRing(lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event)

    def open(self, shapes: Shapes) -> Staged:
        """Arrays to be filled and sent before the next are opened."""
        if not shapes:
            return _NOTHING
        size = num_bytes(shapes)
        if self._ring is None:
            memory = torch.from_numpy(np.empty(size, dtype=np.uint8))
            return Staged(memory, shapes, lambda: memory)
        buffer = self._ring.take(size)
        return Staged(buffer.memory, shapes, lambda: self._copy(buffer, size))

    def _copy(self, buffer: HostBuffer, size: int) -> Tensor:
        if len(self._on_device) < size:
            self._on_device = torch.empty(_grown(size), dtype=torch.uint8, device=self._device)
        target = self._on_device[:size]
        target.copy_(buffer.memory[:size], non_blocking=True)
        buffer.copied.record()
        return target
