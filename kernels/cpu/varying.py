"""A tape for any number of tokens up to the one with which it was recorded.

    recorded with 900 tokens    linear(x, w, out, 900, ...)    norm(out, out2, 1800, ...)     rows: 1 and 2 a token
    replayed with 40            linear(x, w, out, 40, ...)     norm(out, out2, 80, ...)

What is made lies in the same memory as then, of which fewer rows are used; what is given may lie elsewhere. It takes a
recording that is nothing but C++ ops, each of which says which of its arguments count what (`functions.py`): no other
may depend on the step. That ops are the same with fewer rows is the caller's to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .functions import BLOCKS, POINTER, ROWS, SEQUENCES
from .tape import Tape


@dataclass(frozen=True)
class Extent:
    """What counts in a step."""

    num_tokens: int
    num_seqs: int
    max_blocks: int  # columns of its block tables


class VaryingTape:
    """tape: recorded for a step of this extent; inputs: its arrays, by name; outputs: what it made, rows for tokens.

    Raises ValueError for a tape that cannot be replayed so.
    """

    def __init__(
        self, tape: Tape, extent: Extent, inputs: Mapping[str, Tensor], outputs: Sequence[Tensor | None]
    ) -> None:
        if not tape.is_one_call:
            raise ValueError(tape.spoiled or "there is more on the tape than C++ ops")
        signatures, self._slots = tape.arguments()
        if any(not {ROWS, SEQUENCES} & set(signature) for signature in signatures):
            raise ValueError("an op does not say what of its arguments goes with the tokens")
        letters = np.array(list("".join(signatures)))
        self.most_tokens, self._tape = extent.num_tokens, tape
        self._rows = (letters == ROWS).nonzero()[0]
        self._rows_a_token, rest = np.divmod(self._slots[self._rows], extent.num_tokens)
        if rest.any():
            raise ValueError("an op has a number of rows other than so many a token")
        self._seqs, self._widths = ((letters == letter).nonzero()[0] for letter in (SEQUENCES, BLOCKS))
        pointers = np.where(letters == POINTER, self._slots, 0)
        if any(len(out) % extent.num_tokens for out in outputs if out is not None):
            raise ValueError("an output has a number of rows other than so many a token")
        self._outputs = [None if out is None else out.unflatten(0, (extent.num_tokens, -1)) for out in outputs]
        if {out.data_ptr() for out in outputs if out is not None} & {x.data_ptr() for x in inputs.values()}:
            raise ValueError("what is given is among what is made")
        self._inputs = {}
        for name, tensor in inputs.items():
            offsets = pointers - tensor.data_ptr()
            self._inputs[name] = (offsets == 0).nonzero()[0]
            if ((offsets > 0) & (offsets < tensor.nbytes)).any():
                raise ValueError(f"an op takes a part of {name}")

    def replay(self, extent: Extent, inputs: Mapping[str, Tensor]) -> list[Tensor | None]:
        """With at most as many tokens, on these arrays. Gives its outputs, until the next replay."""
        assert extent.num_tokens <= self.most_tokens and inputs.keys() == self._inputs.keys()
        slots = self._slots
        slots[self._rows] = self._rows_a_token * extent.num_tokens
        slots[self._seqs], slots[self._widths] = extent.num_seqs, extent.max_blocks
        for name, places in self._inputs.items():
            slots[places] = inputs[name].data_ptr()
        self._tape.replay()
        return [None if out is None else out[: extent.num_tokens].flatten(0, 1) for out in self._outputs]
