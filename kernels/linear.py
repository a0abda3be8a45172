"""``linear``: ``x @ weight.T + bias``, bound once to the form of the weight that this processor multiplies fastest.

A weight is held once, in one of these forms:

    compact   in 12 bits an element instead of 16, or 28 instead of 32, and fewer where a float32 says no more than a
              bfloat16 (12) or float16 (20), without loss (`cpu/compact.h`): of few rows, reading the weight is what
              takes the time. Our own op multiplies any number of rows with it; if oneDNN is faster with many, it gets
              them, the weight being laid out for it first, where all of a shape are
    packed    oneDNN's blocked layout, which oneDNN multiplies with many rows, our own op with few (`cpu/linear.cpp`):
              float16, processors without AVX512-BF16, and weights of too many magnitudes
    plain     as it comes, shared with others, or where torch has no oneDNN

From how many rows on oneDNN is the faster is measured on the processor that this runs on (`crossover.py`).
"""

import ctypes
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import CpuLinear
from .crossover import ROWS, streamed_rows
from .eager import Activation

Linear = Callable[[Tensor, Tensor | None], Tensor]
"""x [num_tokens, in], or with more dimensions before, bias [out] or None -> [num_tokens, out]."""
LookUp = Callable[[Tensor, int], Tensor]
"""token_ids [num_tokens], the first id of a vocabulary shard -> [num_tokens, in]: `eager.embedding` with its weight."""


BindLinear = Callable[[Tensor], Linear]
"""A weight [out, in] -> the product with it."""
BindGatedLinear = Callable[[Tensor, str], Linear]
"""A weight [gate and up, in] and a kind -> `eager.gated_activation` of the product with it."""


def bind_plain(weight: Tensor) -> Linear:
    """The eager definition; shares `weight` [out, in]."""
    return lambda x, bias: F.linear(x, weight, bias)


def followed(linear: Linear, activation: Activation) -> Linear:
    """Both, one after the other."""
    return lambda x, bias: activation(linear(x, bias))


def bind_plain_gated(weight: Tensor, kind: str, *, gated_activation: Callable[[str], Activation]) -> Linear:
    """`bind_plain`, and the activation."""
    return followed(bind_plain(weight), gated_activation(kind))


def bind_plain_tied(weight: Tensor, stays: bool) -> tuple[Linear, None]:
    """`bind_tied` of those."""
    return bind_plain(weight), None


def bind(weight: Tensor, *, ours: CpuLinear | None = None) -> Linear:
    """A copy of `weight` [out, in], compact or packed, so that the caller can let the plain one go.

    ours: the C++ products, where there are any.
    """
    return _held(weight, ours)[0]


def bind_gated(
    weight: Tensor, kind: str, *, ours: CpuLinear | None, gated_activation: Callable[[str], Activation]
) -> Linear:
    """A product as in `bind`, and the activation: as one op where the weight is held compact."""
    own, activation = _of_dtype(ours, weight), gated_activation(kind)
    if own is None or not own.compacts or not own.gates(kind, len(weight)):
        return followed(bind(weight, ours=ours), activation)
    compact = bind_compact(own.in_turns(weight), ours=own, gate=(kind, activation))
    return followed(bind_packed(weight, ours=own)[0], activation) if compact is None else compact[0]


def bind_tied(weight: Tensor, stays: bool, ours: CpuLinear | None = None) -> tuple[Linear, LookUp | None]:
    """The product with a weight [out, in] in which rows are looked up, too.

    stays: whether others need the plain weight in any case. With a look-up the caller can let it go; None: it cannot.
    """
    linear, look_up = (None, None) if stays else _held(weight, ours)
    if linear is None or look_up is None:
        return bind_shared(weight, ours), None
    return linear, look_up


def bind_shared(weight: Tensor, ours: CpuLinear | None = None) -> Linear:
    """The product with a plain weight that others read too, through oneDNN: faster than torch's own in float32."""
    ours = _of_dtype(ours, weight)
    few = 0 if ours is None else _few_plain(weight, ours) * weight.shape[1]

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        if ours is not None and x.numel() <= few and x.is_contiguous():
            return ours.linear_plain(x, weight, bias)
        return _onednn(x, weight, bias)

    return linear


def _of_dtype(ours: CpuLinear | None, weight: Tensor) -> CpuLinear | None:
    """Unless a weight has another dtype than the model, as some routers do."""
    return ours if ours is not None and ours.torch_dtype == weight.dtype else None


def _held(weight: Tensor, ours: CpuLinear | None) -> tuple[Linear, LookUp | None]:
    ours = _of_dtype(ours, weight)
    bound = None if ours is None else bind_compact(weight, ours=ours)
    return bound or bind_packed(weight, ours=ours)


def bind_compact(
    weight: Tensor, *, ours: CpuLinear, gate: tuple[str, Activation] | None = None
) -> tuple[Linear, LookUp] | None:
    """The product with the compact form, and the look-up in it; None where it is not the best, or cannot be.

    gate: the kind, and the op, of an activation that follows; the weight has gate and up `CpuLinear.in_turns` then.
    """
    most = _most_compact(weight, ours)
    held = ours.compact(weight) if most else None
    if held is None:
        return None
    panels = None if most == ROWS[-1] else _Panels.like(weight, ours)
    if panels is not None and panels.address is None:
        return None
    size_out, size_in = weight.shape
    few = most * size_in
    kind, activation = gate or (None, None)

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        if panels is None or x.numel() <= few:
            return ours.linear_compact(x.contiguous(), held.data_ptr(), bias, size_out, kind)
        out = panels.multiply(x, held.data_ptr(), bias, in_turns=kind is not None)
        return out if activation is None else activation(out)

    def look_up(token_ids: Tensor, start: int) -> Tensor:
        return ours.embedding_compact(token_ids, held.data_ptr(), size_in, size_out, start)

    return linear, look_up


def bind_packed(weight: Tensor, *, ours: CpuLinear | None = None) -> tuple[Linear, LookUp | None]:
    """The product with the packed form, and the look-up in it, if our op knows how oneDNN has laid out this weight."""
    packed = _reordered(weight)
    address = None if ours is None else _address_of_panels(weight, packed, ours.panel)
    if ours is None or address is None:
        return lambda x, bias: _onednn(x, packed, bias), None
    product, embedding, (size_out, size_in) = ours.linear_packed, ours.embedding_packed, weight.shape
    few = _few_packed(weight, ours) * size_in

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= few and x.is_contiguous():
            return product(x, address, bias, size_out)
        return _onednn(x, packed, bias)

    return linear, lambda token_ids, start: embedding(token_ids, address, size_in, size_out, start)


class _Panels:
    """Memory in oneDNN's layout that compact weights of one shape share; address: None if the layout is unknown.

    Of one stage, which computes in one thread: `ours` is its own.
    """

    _all: ClassVar["WeakValueDictionary[tuple[CpuLinear, torch.Size], _Panels]"] = WeakValueDictionary()

    def __init__(self, weight: Tensor, ours: CpuLinear) -> None:
        self.packed, self._ours = _reordered(weight), ours
        self._size_out, self._size_in = weight.shape
        self.address = _address_of_panels(weight, self.packed, ours.panel)

    @classmethod
    def like(cls, weight: Tensor, ours: CpuLinear) -> "_Panels":
        found = cls._all.get((ours, weight.shape))
        if found is None:
            found = cls._all[ours, weight.shape] = cls(weight, ours)
        return found

    def multiply(self, x: Tensor, compact: int, bias: Tensor | None, in_turns: bool = False) -> Tensor:
        assert self.address is not None
        self._ours.expand(compact, self.address, self._size_out, self._size_in, in_turns)
        return _onednn(x, self.packed, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """weight: packed, or plain [out, in]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def _reordered(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def _most_compact(like: Tensor, ours: CpuLinear) -> int:
    """Rows up to which the compact form is multiplied by our own op; 0 where it cannot be had.

    What is measured is the form that takes longest, of 28 bits for float32.
    """
    if not ours.compacts:
        return 0

    def prepare(weight: Tensor) -> tuple[int, _Panels, Tensor]:
        held = ours.compact(weight)
        assert held is not None  # normally distributed
        return len(weight), _Panels.like(weight, ours), held

    def multiply(x: Tensor, weight: tuple[int, _Panels, Tensor]) -> Tensor:
        return ours.linear_compact(x, weight[2].data_ptr(), None, weight[0])

    def expand_and_multiply(x: Tensor, weight: tuple[int, _Panels, Tensor]) -> Tensor:
        _, panels, held = weight
        if panels.address is None:
            return _onednn(x, panels.packed, None)
        return panels.multiply(x, held.data_ptr(), None)

    return streamed_rows("compact", like, prepare, multiply, expand_and_multiply)


def _few_packed(like: Tensor, ours: CpuLinear) -> int:
    """Rows up to which a packed weight is multiplied by our own op."""

    def prepare(weight: Tensor) -> tuple[Tensor, int, int]:
        packed = _reordered(weight)
        return packed, int(torch.ops.mkldnn.data_ptr(packed)), len(weight)

    return streamed_rows(
        "packed",
        like,
        prepare,
        lambda x, weight: ours.linear_packed(x, weight[1], None, weight[2]),
        lambda x, weight: _onednn(x, weight[0], None),
    )


def _few_plain(like: Tensor, ours: CpuLinear) -> int:
    """Rows up to which a plain weight is."""
    return streamed_rows(
        "plain",
        like,
        lambda weight: weight,
        lambda x, weight: ours.linear_plain(x, weight, None),
        lambda x, weight: _onednn(x, weight, None),
    )


def why_plain(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `bind_packed` does not work here, which is tried on a small product: it stands on operators that torch keeps
    to itself."""
    if device.type != "cpu":
        return f"oneDNN's is for CPUs, and the device is {device}"
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN"
    try:
        x, weight = torch.ones(3, 8, dtype=dtype), torch.arange(32.0).view(4, 8).to(dtype)
        alike = torch.equal(bind_packed(weight)[0](x, None), F.linear(x, weight))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return " ".join(str(error).split())
    return None if alike else f"oneDNN's product is wrong in {dtype}"


def _address_of_panels(weight: Tensor, packed: Tensor, panel: tuple[int, int, int]) -> int | None:
    """Where oneDNN has laid out a weight as our own op reads it (`CpuLinear.panel`); None if it has not: on another
    processor it may lay it out in another way.

    Looks at its size, and at all of the first panel and the last.
    """
    (size_out, size_in), (height, depth, step) = weight.shape, panel
    num_panels, padded_in = -(-size_out // height), -(-size_in // (depth * step)) * depth * step
    num_bytes = height * padded_in * weight.element_size()
    try:
        if torch.ops.mkldnn._nbytes(packed) != num_panels * num_bytes:
            return None
        address = int(torch.ops.mkldnn.data_ptr(packed))
    except (RuntimeError, AttributeError):  # operators that torch keeps to itself
        return None
    for number in {0, num_panels - 1}:
        rows = weight[number * height : (number + 1) * height]
        rows = F.pad(rows, (0, padded_in - size_in, 0, height - len(rows)))
        expected = rows.view(height, padded_in // step, step).transpose(0, 1).contiguous()
        if ctypes.string_at(address + number * num_bytes, num_bytes) != expected.view(torch.uint8).numpy().tobytes():
            return None
    return address
