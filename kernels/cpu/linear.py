"""The C++ products with a weight, in the forms in which it can be held (`kernels/linear.py` binds them)."""

import torch
from torch import Tensor

from ..eager import KINDS
from .functions import Function, Functions, address, function, question

_WORTH = 1 / 32  # of a weight's bytes: what rare elements may take beside the others; more takes longer than it saves


class CpuLinear(Functions):
    """For one dtype. Raises Unavailable.

    panel: of a packed weight, its height, of which multiple its steps are, and elements in a step.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        library = self._library
        self._linear_plain = function(library, "linear_plain", "ipppp" + "nllli")
        self._linear_packed = function(library, "linear_packed", "ipppp" + "nlli")
        self._embedding_packed = function(library, "embedding_packed", "ippp" + "nllli")
        self._linear_compact = function(library, "linear_compact", "iipppp" + "nlli")
        self._embedding_compact = function(library, "embedding_compact", "ippp" + "nllli")
        self._expand_compact = function(library, "expand_compact", "ipp" + "llli")
        self._compact_bytes = question(library, "compact_bytes", "ip" + "lll" + "pi")
        self._compact_weight = function(library, "compact_weight", "ip" + "lll" + "pp" + "li")
        step: int = library.grouped_step(self._dtype)
        self.panel: tuple[int, int, int] = (library.linear_panel(), library.linear_depth(), step)

    def linear_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] with weight [out, in]; for few rows."""
        assert x.is_contiguous() and weight.stride(1) == 1 and (bias is None or bias.is_contiguous())
        size_out, size_in = weight.shape
        rows, out = x.numel() // size_in, torch.empty(*x.shape[:-1], size_out, dtype=x.dtype)
        self._linear_plain(
            self._dtype,
            x.data_ptr(),
            weight.data_ptr(),
            address(bias),
            out.data_ptr(),
            rows,
            size_in,
            size_out,
            weight.stride(0),
            self._threads,
        )
        return out

    def linear_packed(self, x: Tensor, packed: int, bias: Tensor | None, size_out: int) -> Tensor:
        """x [..., in] with a weight in panels (`linear.cpp`) at the address `packed`; for few rows."""
        return self._multiply(self._linear_packed, (), x, packed, bias, size_out, size_out)

    def embedding_packed(self, token_ids: Tensor, packed: int, size_in: int, rows: int, start: int) -> Tensor:
        """`eager.embedding` of a weight [rows, size_in] in panels (`linear.cpp`) at the address `packed`."""
        out = self._looked_up(token_ids, size_in)
        self._embedding_packed(
            self._dtype, token_ids.data_ptr(), packed, out.data_ptr(), len(out), size_in, rows, start, self._threads
        )
        return out

    @property
    def compacts(self) -> bool:
        """Whether weights can be held compact here."""
        return self.compact(torch.ones(64, 64, dtype=self.torch_dtype)) is not None

    def compact(self, weight: Tensor) -> Tensor | None:
        """A copy of `weight` [out, in] in fewer bits an element (`compact.h`), or None where that saves too little."""
        assert weight.stride(1) == 1 and weight.dtype == self.torch_dtype
        (size_out, size_in), (height, depth, step) = weight.shape, self.panel
        in_panels = -(-size_out // height) * height * -(-size_in // (depth * step)) * depth * step * weight.itemsize
        given = self._dtype, weight.data_ptr(), size_in, size_out, weight.stride(0)
        places = torch.empty(257, dtype=torch.uint8)
        num_bytes = self._compact_bytes(*given, places.data_ptr(), self._threads)
        bits, held = 8 * weight.itemsize, 12 + int(places[256])
        if not 0 < num_bytes <= (held / bits + _WORTH) * in_panels:
            return None
        compact = torch.empty(num_bytes, dtype=torch.uint8)
        self._compact_weight(*given, places.data_ptr(), compact.data_ptr(), num_bytes, self._threads)
        return compact

    def linear_compact(
        self, x: Tensor, compact: int, bias: Tensor | None, size_out: int, kind: str | None = None
    ) -> Tensor:
        """`linear_packed` with a compact weight at that address; for any number of rows.

        kind: of an activation by which the product is gated (`eager.gated_activation`), rounded in between as two ops
        round: x [..., in] -> [..., size_out / 2]. The weight has gate and up `in_turns`, the bias one after the other.
        """
        gate, columns = (-1, size_out) if kind is None else (KINDS.index(kind), size_out // 2)
        return self._multiply(self._linear_compact, (gate,), x, compact, bias, size_out, columns)

    def gates(self, kind: str, size_out: int) -> bool:
        """Whether `linear_compact` takes that kind with a weight [size_out, in]."""
        return kind != "swiglu_oai" and size_out % (2 * self.panel[0]) == 0

    def in_turns(self, weight: Tensor) -> Tensor:
        """Of a weight [gate and up, in] a copy with a panel's height of each in turns."""
        return weight.unflatten(0, (2, -1, self.panel[0])).transpose(0, 1).flatten(0, 2)

    def embedding_compact(self, token_ids: Tensor, compact: int, size_in: int, rows: int, start: int) -> Tensor:
        """`embedding_packed` of a compact weight."""
        out = self._looked_up(token_ids, size_in)
        self._embedding_compact(
            self._dtype, token_ids.data_ptr(), compact, out.data_ptr(), len(out), size_in, rows, start, self._threads
        )
        return out

    def expand(self, compact: int, packed: int, size_out: int, size_in: int, in_turns: bool = False) -> None:
        """Writes a compact weight in panels (`linear.cpp`) to the address `packed`, gate first.

        in_turns: how it is held.
        """
        self._expand_compact(self._dtype, compact, packed, size_in, size_out, 2 if in_turns else 1, self._threads)

    def _multiply(
        self,
        product: Function,
        options: tuple[int, ...],
        x: Tensor,
        weight: int,
        bias: Tensor | None,
        size_out: int,
        columns: int,
    ) -> Tensor:
        assert x.is_contiguous() and (bias is None or bias.is_contiguous())
        size_in = x.shape[-1]
        out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype)
        rows = x.numel() // size_in
        product(
            self._dtype,
            *options,
            x.data_ptr(),
            weight,
            address(bias),
            out.data_ptr(),
            rows,
            size_in,
            size_out,
            self._threads,
        )
        return out

    def _looked_up(self, token_ids: Tensor, size_in: int) -> Tensor:
        assert token_ids.is_contiguous() and token_ids.dtype == torch.int64
        return torch.empty(len(token_ids), size_in, dtype=self.torch_dtype)
