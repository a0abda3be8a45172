"""Functions of the library, as Python calls them."""

from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from typing import Any

import torch
from torch import Tensor

from .build import Unavailable, load_library
from .tape import current_tape

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Function = Callable[..., None]
POINTER, ROWS, SEQUENCES, BLOCKS = "pnsb"  # letters of a signature; the others: i int, l long, f float
_TYPES = {"i": c_int, "l": c_long, "f": c_float, POINTER: c_void_p, ROWS: c_long, SEQUENCES: c_long, BLOCKS: c_long}


class Functions:
    """The library's functions for one dtype, and what each of them needs to know for good. Raises Unavailable."""

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise Unavailable(f"no C++ ops for {dtype}")
        self.torch_dtype, self._dtype = dtype, DTYPES[dtype]
        self._threads = torch.get_num_threads()
        self._library = load_library()


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def function(library: CDLL, name: str, signature: str) -> Function:
    """signature: a letter an argument; of what is done with a step's tokens, all that counts these, or as many times
    them, are `ROWS`, and what counts its sequences, and the blocks that the longest may have, the next two. A tape that
    records notes its calls."""
    native = getattr(library, name)
    native.argtypes = [_TYPES[letter] for letter in signature]
    native.restype = None

    def call(*arguments: Any) -> None:
        tape = current_tape()
        if tape is not None:
            tape.op(library, name, signature, arguments)
        native(*arguments)

    return call


def question(library: CDLL, name: str, signature: str) -> Callable[..., int]:
    """The same of one that returns a long, for when weights are made; not for a tape."""
    native = getattr(library, name)
    native.argtypes = [_TYPES[letter] for letter in signature]
    native.restype = c_long
    return lambda *arguments: int(native(*arguments))
