"""``linear``: ``x @ weight.T + bias``, bound once to the forms of the weight that the device multiplies fastest.

On a CPU with oneDNN the weight is kept once, in oneDNN's own blocked layout; a plain weight would be laid out again, or
multiplied slower, in each call. oneDNN multiplies many rows with it. Of fewer rows, reading the weight is what takes
the time, and our own op (`cpu/linear.cpp`) reads it where oneDNN has put it, in a straight line. How many are few is
measured on the processor that it runs on (`crossover.py`).
"""

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .crossover import streamed_rows

Linear = Callable[[Tensor, Tensor | None], Tensor]
"""x [num_tokens, in], or with more dimensions before, bias [out] or None -> [num_tokens, out]."""
LookUp = Callable[[Tensor, int], Tensor]
"""token_ids [num_tokens], the first id of a vocabulary shard -> [num_tokens, in]: `eager.embedding` with its weight."""


class Streaming(Protocol):
    """Products of few rows that read the weight once (`cpu/ops.py`).

    panel: of a packed weight, its height, of which multiple its steps are, and elements in a step.
    """

    panel: tuple[int, int, int]

    def linear_packed(
        self, x: Tensor, packed: int, bias: Tensor | None, size_out: int, widens: bool = False
    ) -> Tensor: ...

    def linear_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def embedding_packed(self, token_ids: Tensor, packed: int, size_in: int, rows: int, start: int) -> Tensor: ...


class BindLinear(Protocol):
    """A weight [out, in] -> the product with it. widens: what comes out may be float32 already, rounded before that to
    the weight's dtype."""

    def __call__(self, weight: Tensor, *, widens: bool = False) -> Linear: ...


def bind_plain(weight: Tensor, *, widens: bool = False) -> Linear:
    """The eager definition; shares `weight` [out, in]."""
    return lambda x, bias: F.linear(x, weight, bias)


def bind_plain_tied(weight: Tensor, stays: bool) -> tuple[Linear, None]:
    """`bind_tied` of those."""
    return bind_plain(weight), None


def bind_packed(weight: Tensor, *, widens: bool = False, streaming: Streaming | None = None) -> Linear:
    """oneDNN's blocked layout of `weight` [out, in]: a copy, so that the caller can let the plain one go.

    streaming: takes over few rows, if it knows how oneDNN has laid out this weight.
    """
    return _packed(weight, streaming, widens)[0]


def bind_tied(weight: Tensor, stays: bool, streaming: Streaming | None = None) -> tuple[Linear, LookUp | None]:
    """The product with a weight [out, in] in which rows are looked up, too; it may come widened (`BindLinear`).

    stays: whether others need the plain weight in any case. With a look-up the caller can let it go; None: it cannot.
    """
    linear, address = (None, None) if stays else _packed(weight, streaming, widens=True)
    if linear is None or address is None or streaming is None:
        return bind_shared(weight, streaming), None
    look_up, (rows, size_in) = streaming.embedding_packed, weight.shape
    return linear, lambda token_ids, start: look_up(token_ids, address, size_in, rows, start)


def _packed(weight: Tensor, streaming: Streaming | None, widens: bool) -> tuple[Linear, int | None]:
    """`bind_packed`, and where the weight lies, if it is streamed; it stays as long as the product."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    product = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = product(x, packed, bias, "none", [], "")
        return out

    if streaming is None or not _is_in_panels(weight, packed, streaming.panel):
        return linear, None
    stream, size_out = streaming.linear_packed, len(weight)
    few = _few_packed(weight, streaming) * weight.shape[1]
    address = int(torch.ops.mkldnn.data_ptr(packed))

    def linear_or_streamed(x: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= few and x.is_contiguous():
            return stream(x, address, bias, size_out, widens)
        return linear(x, bias)

    return linear_or_streamed, address


def bind_shared(weight: Tensor, streaming: Streaming | None = None) -> Linear:
    """The product with a plain weight that others read too, through oneDNN: faster than torch's own in float32."""
    product = torch.ops.mkldnn._linear_pointwise.default
    few = 0 if streaming is None else _few_shared(weight, streaming) * weight.shape[1]

    def linear(x: Tensor, bias: Tensor | None) -> Tensor:
        if streaming is not None and x.numel() <= few and x.is_contiguous():
            return streaming.linear_plain(x, weight, bias)
        out: Tensor = product(x, weight, bias, "none", [], "")
        return out

    return linear


def _few_packed(like: Tensor, streaming: Streaming) -> int:
    """Rows up to which a packed weight is streamed."""
    product, address = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn.data_ptr

    def prepare(weight: Tensor) -> tuple[Tensor, int, int]:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return packed, int(address(packed)), len(weight)

    return streamed_rows(
        "packed",
        like,
        prepare,
        lambda x, weight: streaming.linear_packed(x, weight[1], None, weight[2]),
        lambda x, weight: product(x, weight[0], None, "none", [], ""),
    )


def _few_shared(like: Tensor, streaming: Streaming) -> int:
    """Rows up to which a plain weight is."""
    product = torch.ops.mkldnn._linear_pointwise.default
    return streamed_rows(
        "plain",
        like,
        lambda weight: weight,
        lambda x, weight: streaming.linear_plain(x, weight, None),
        lambda x, weight: product(x, weight, None, "none", [], ""),
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
        alike = torch.equal(bind_packed(weight)(x, None), F.linear(x, weight))
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return " ".join(str(error).split())
    return None if alike else f"oneDNN's product is wrong in {dtype}"


def _is_in_panels(weight: Tensor, packed: Tensor, panel: tuple[int, int, int]) -> bool:
    """Whether oneDNN has laid out a weight as `Streaming` reads it; on another processor it may not have.

    Looks at its size, and at all of the first panel and the last.
    """
    (size_out, size_in), (height, depth, step) = weight.shape, panel
    num_panels, padded_in = -(-size_out // height), -(-size_in // (depth * step)) * depth * step
    num_bytes = height * padded_in * weight.element_size()
    try:
        if torch.ops.mkldnn._nbytes(packed) != num_panels * num_bytes:
            return False
        address = int(torch.ops.mkldnn.data_ptr(packed))
    except (RuntimeError, AttributeError):  # operators that torch keeps to itself
        return False
    for number in {0, num_panels - 1}:
        rows = weight[number * height : (number + 1) * height]
        rows = F.pad(rows, (0, padded_in - size_in, 0, height - len(rows)))
        expected = rows.view(height, padded_in // step, step).transpose(0, 1).contiguous()
        if ctypes.string_at(address + number * num_bytes, num_bytes) != expected.view(torch.uint8).numpy().tobytes():
            return False
    return True
