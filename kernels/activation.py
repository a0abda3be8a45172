"""Activations, alone or gated: ``activation(gate) * up`` (Shazeer 2020).

In float32 inside; a gated one is rounded to the input's dtype before the product, as the definitions do. Definitions:
`eager.activation`, `eager.gated_activation`.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eager import Activation
from .rows import power_of_two

_MAX_BLOCK = 1024


@triton.jit
def _activated(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    if KIND == "silu":
        result = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(t)) / 2 = 1 / (1 + exp(-2t)), which keeps its digits where tanh is close to -1
        doubled = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 * sqrt(2 / pi)
        result = x / (1.0 + tl.exp(-doubled))
    elif KIND == "quick_gelu":
        result = x / (1.0 + tl.exp(-1.702 * x))
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu2")
        result = tl.where(x < 0.0, 0.0, x)
        if KIND == "relu2":
            result *= result
    return result


@triton.jit
def _activation_kernel(
    x: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    wide = tl.load(x + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + cols, _activated(wide, KIND).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(
    gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(gate_up + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + N + cols, mask=mask, other=0.0).to(tl.float32)
    activated = _activated(gate, KIND).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * N + cols, (activated * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_oai_kernel(
    gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    pairs = 2 * first + tl.arange(0, 2 * BLOCK)
    both = tl.load(gate_up + row * row_stride + pairs, mask=pairs < 2 * N, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    gate = tl.where(gate > 7.0, 7.0, gate)
    up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
    result = (up + 1.0) * _activated(gate, "quick_gelu")
    cols = first + tl.arange(0, BLOCK)
    tl.store(out + row * N + cols, result.to(out.dtype.element_ty), mask=cols < N)


def activation(kind: str) -> Activation:
    """`eager.activation`; the elements of a row of x lie side by side."""
    return partial(_launch, _activation_kernel, kind, 1)


def gated_activation(kind: str) -> Activation:
    """`eager.gated_activation`; the elements of a row of gate_up lie side by side."""
    return partial(_launch, _swiglu_oai_kernel if kind == "swiglu_oai" else _gate_kernel, kind, 2)


def _launch(kernel: "triton.JITFunction[None]", kind: str, inputs: int, x: Tensor) -> Tensor:
    """inputs: elements that make one of the output."""
    num_tokens, n = x.shape[0], x.shape[1] // inputs
    assert x.shape[1] == inputs * n and (x.stride(1) == 1 or x.shape[1] == 1)
    out = torch.empty((num_tokens, n), dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(power_of_two(n), _MAX_BLOCK)
        kernel[(num_tokens, -(-n // block))](
            x, out, x.stride(0), N=n, KIND=kind, BLOCK=block, num_warps=max(1, block // 256)
        )
    return out
