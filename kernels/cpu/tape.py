"""What a function did on the CPU, recorded so that it can be done again on the same memory with hardly any Python.

    recorded                             replayed
    C++ op, C++ op, ...                  one call of a C++ function that makes them all (`calls.cpp`)
    an op of torch's                     called again, its result written to where the first one lies
    what was given to `Tape.do`          called again (collectives)
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
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A recording. `spoiled`: why it must not be replayed, or None."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.spoiled: str | None = None
        self._parts: list[Callable[[], object]] = []
        self._calls: list[tuple[int, str, bytes]] = []  # since the last part: address, signature, arguments
        self._library: CDLL | None = None

    def call(self, library: CDLL, name: str, signature: str, arguments: tuple[Any, ...]) -> None:
        """Notes that a C++ op was called."""
        function = cast(getattr(library, f"{name}_call"), c_void_p).value
        assert function is not None
        self._library = library
        packed = struct.pack("=" + "".join(_SLOTS[letter] for letter in signature), *(a or 0 for a in arguments))
        self._calls.append((function, signature, packed))

    def do(self, function: Callable[[], object]) -> None:
        """Notes that something was done in Python."""
        self._end_calls()
        self._parts.append(function)

    def _end_calls(self) -> None:
        if not self._calls:
            return
        assert self._library is not None
        arguments = b"".join(packed for *_, packed in self._calls)
        memory = (c_char * len(arguments)).from_buffer_copy(arguments)
        table, base = array("Q"), addressof(memory)
        for function, _, packed in self._calls:
            table.extend((function, base))
            base += len(packed)
        run = self._library.run_calls
        run.argtypes, run.restype = (c_void_p, c_long), None
        signatures = [signature for _, signature, _ in self._calls]
        self._parts.append(_Calls(run, table, signatures, memory))
        self._calls = []

    @property
    def is_one_call(self) -> bool:
        """Whether all that is recorded are C++ ops."""
        return self.spoiled is None and all(isinstance(part, _Calls) for part in self._parts)

    def arguments(self) -> tuple[list[str], NDArray[np.int64]]:
        """Of a recording of C++ ops alone: their signatures, and all their arguments one after the other, eight bytes
        each, which may be changed between replays."""
        assert self.is_one_call
        calls = [part for part in self._parts if isinstance(part, _Calls)]
        if not calls:
            return [], np.zeros(0, np.int64)
        (only,) = calls
        return only.signatures, np.frombuffer(only.arguments, np.int64)

    def replay(self) -> None:
        for part in self._parts:
            part()


class _Calls:
    """One call for many."""

    def __init__(
        self, run: Callable[[int, int], None], table: "array[int]", signatures: list[str], arguments: Any
    ) -> None:
        self._call = partial(run, table.buffer_info()[0], len(signatures))
        self._table, self.signatures, self.arguments = table, signatures, arguments

    def __call__(self) -> None:
        self._call()


class _Watch(TorchDispatchMode):
    """Sees the ops of torch's that come between."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        returned = [each.alias_info for each in func._schema.returns]
        if func.namespace == "c10d":  # it goes on when the call is over, and `out` is a handle
            self._spoil(f"{func} is a collective that the tape was not given")
        elif func._schema.is_mutable:
            self._tape.do(partial(func, *args, **kwargs))
        elif any(alias is not None for alias in returned):
            pass  # a view
        elif not isinstance(out, Tensor):
            self._spoil(f"{func} gives something else than a tensor")
        elif func.overloadpacket not in _FACTORIES:
            self._tape.do(_again(func, args, kwargs, out))
        elif out.is_cpu and out.is_contiguous():
            return self._tape.pool.empty(tuple(out.shape), out.dtype)
        return out

    def _spoil(self, reason: str) -> None:
        self._tape.spoiled = self._tape.spoiled or reason


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
