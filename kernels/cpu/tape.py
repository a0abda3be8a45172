"""What a function did on the CPU, recorded so that it can be done again on the same memory with hardly any Python.

    recorded                             replayed
    C++ op, C++ op, ...                  one call of a C++ function that makes them all (`calls.cpp`)
    what was given to `Tape.call`        among these (collectives through shared memory)
    an op of torch's                     called again, its result written to where the first one lies
    what was given to `Tape.do`          called again (other collectives)
    a view, new memory                   nothing: it is still there

Memory that becomes free while a function is recorded is used again by what follows in it, as it was when it ran, and
by other recordings that share the pool.

What depends on values that were read in Python would be replayed wrongly, so it spoils the tape.
"""

import struct
import threading
import weakref
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import CDLL, addressof, c_char, c_long, c_void_p, cast
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .build import load_library

_ALIGNMENT = 64
_SLOTS = {"i": "q", "l": "q", "p": "Q", "f": "f4x", "n": "q", "s": "q", "b": "q"}  # an `Argument`, by its letter


class Pool:
    """Memory for the tensors of recordings; what one has given up, the next takes."""

    def __init__(self) -> None:
        self._free: dict[int, list[Any]] = defaultdict(list)  # by size

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        size = max(_ALIGNMENT, 1 << (dtype.itemsize * prod(shape) - 1).bit_length())
        free = self._free[size]
        memory = free.pop() if free else np.zeros(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        lent = memory[start : start + size]
        weakref.finalize(lent, free.append, memory)  # its storage keeps `lent`, and lets it go with its last tensor
        return torch.frombuffer(lent, dtype=dtype, count=prod(shape)).view(shape)


def lent(tensor: Tensor) -> Tensor:
    """The same memory of a pool, which gives it away again all the same."""
    assert tensor.is_contiguous()
    memory = (c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


class Tape:
    """A recording. `spoiled`: why it must not be replayed, or None.

    calls_only: it is of no use with anything else on it than calls, and from there on keeps nothing.
    """

    def __init__(self, pool: Pool, calls_only: bool = False) -> None:
        self.pool, self.calls_only = pool, calls_only
        self.spoiled: str | None = None
        self._parts: list[Callable[[], object]] = []
        self._calls: list[_Call] = []  # since the last part

    def op(self, library: CDLL, name: str, signature: str, arguments: tuple[Any, ...]) -> None:
        """Notes that a C++ op was called, which does not fail."""
        function = cast(getattr(library, f"{name}_call"), c_void_p).value
        assert function is not None
        self.call(function, signature, arguments, _never)

    def call(self, function: int, signature: str, arguments: tuple[Any, ...], failed: Callable[[int], object]) -> None:
        """Notes that something was called that is an `int(const Argument*)` as well (`calls.h`), at this address.

        signature: as in `functions.py`. failed: called in a replay with the status that it gave, from 1 to 255, in its
        place: what comes after is not done.
        """
        if self.has_ended:
            return
        packed = struct.pack("=" + "".join(_SLOTS[letter] for letter in signature), *(a or 0 for a in arguments))
        self._calls.append(_Call(function, signature, packed, failed))

    def do(self, function: Callable[[], object]) -> None:
        """Notes that something was done in Python."""
        if self.calls_only:
            self.spoil("there is more on the tape than C++ ops")
            return
        self._end_calls()
        self._parts.append(function)

    def spoil(self, reason: str) -> None:
        """It must not be replayed."""
        self.spoiled = self.spoiled or reason
        if self.calls_only:
            self._parts, self._calls = [], []

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is noted."""
        return self.calls_only and self.spoiled is not None

    def _end_calls(self) -> None:
        if not self._calls:
            return
        self._parts.append(_Calls(self._calls))
        self._calls = []

    @property
    def is_one_call(self) -> bool:
        """Whether all that is recorded are calls of C++ functions."""
        return self.spoiled is None and all(isinstance(part, _Calls) for part in self._parts)

    def arguments(self) -> tuple[list[str], NDArray[np.int64]]:
        """Of a recording of such calls alone: their signatures, and all their arguments one after the other, eight
        bytes each, which may be changed between replays."""
        assert self.is_one_call
        calls = [part for part in self._parts if isinstance(part, _Calls)]
        if not calls:
            return [], np.zeros(0, np.int64)
        (only,) = calls
        return only.signatures, np.frombuffer(only.arguments, np.int64)

    def replay(self) -> None:
        for part in self._parts:
            part()


def _never(status: int) -> None:
    raise AssertionError(f"an op that does not fail gave {status}")


@dataclass(frozen=True)
class _Call:
    function: int  # its address
    signature: str
    packed: bytes  # its arguments
    failed: Callable[[int], object]


class _Calls:
    """One call for many."""

    def __init__(self, calls: list[_Call]) -> None:
        arguments = b"".join(call.packed for call in calls)
        self.signatures = [call.signature for call in calls]
        self.arguments: Any = (c_char * len(arguments)).from_buffer_copy(arguments)
        self._failed = [call.failed for call in calls]
        self._table, base = array("Q"), addressof(self.arguments)
        for call in calls:
            self._table.extend((call.function, base))
            base += len(call.packed)
        run = load_library().run_calls
        run.argtypes, run.restype = (c_void_p, c_long), c_long
        self._run = partial(run, self._table.buffer_info()[0], len(calls))

    def __call__(self) -> None:
        result = self._run()
        if result >= 0:
            self._failed[result >> 8](result & 255)


class _Watch(TorchDispatchMode):
    """Sees the ops of torch's that come between."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._tape.has_ended:
            return out
        returned = [each.alias_info for each in func._schema.returns]
        if func.namespace == "c10d":  # it goes on when the call is over, and `out` is a handle
            self._tape.spoil(f"{func} is a collective that the tape was not given")
        elif func._schema.is_mutable:
            self._tape.do(partial(func, *args, **kwargs))
        elif any(alias is not None for alias in returned):
            pass  # a view
        elif not isinstance(out, Tensor):
            self._tape.spoil(f"{func} gives something else than a tensor")
        elif func.overloadpacket not in _FACTORIES:
            self._tape.do(_again(func, args, kwargs, out))
        elif out.is_cpu and out.is_contiguous():
            return self._tape.pool.empty(tuple(out.shape), out.dtype)
        return out


def _again(func: Any, args: Any, kwargs: Any, out: Tensor) -> Callable[[], object]:
    """What calls an op for a result that lies where `out` does."""
    into = getattr(func.overloadpacket, "out", None)
    if into is not None and _arguments(into) == _arguments(func):
        return partial(into, *args, **kwargs, out=out)
    return lambda: out.copy_(func(*args, **kwargs))


def _arguments(func: Any) -> list[tuple[str, str, bool]]:
    return [(each.name, str(each.type), each.kwarg_only) for each in func._schema.arguments if not each.is_out]


_FACTORIES = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}


class _Here(threading.local):
    tape: Tape | None = None


_here = _Here()


def current_tape() -> Tape | None:
    """Where C++ ops that this thread calls are noted."""
    return _here.tape


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Notes on the tape what this thread does in this context."""
    assert _here.tape is None
    with _Watch(tape):
        _here.tape = tape
        try:
            yield
        finally:
            _here.tape = None
    tape._end_calls()
