"""Gated activations: ``silu(gate) * up`` and ``gelu(gate) * up`` (Shazeer 2020), gate and up side by side in a row.

The activation is rounded to the input's dtype before the product, as the definitions do. Definitions:
`eager.silu_and_mul`, `eager.gelu_and_mul`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import power_of_two

_MAX_BLOCK = 1024


@triton.jit
def _gate_kernel(
    gate_up: tl.tensor, out: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    gate = tl.load(gate_up + row * row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + N + cols, mask=mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        activated = gate / (1.0 + tl.exp(-gate))
    elif KIND == "gelu":
        activated = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # (1 + tanh(t)) / 2 = 1 / (1 + exp(-2t)), which keeps its digits where tanh is close to -1
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
        activated = gate / (1.0 + tl.exp(-doubled))
    activated = activated.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * N + cols, (activated * up).to(out.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`eager.silu_and_mul`. gate_up: [num_tokens, 2 * n], the elements of a row side by side."""
    return _launch(gate_up, "silu")


def gelu_and_mul(gate_up: Tensor, tanh: bool) -> Tensor:
    """`eager.gelu_and_mul`. gate_up: [num_tokens, 2 * n], the elements of a row side by side."""
    return _launch(gate_up, "gelu_tanh" if tanh else "gelu")


def _launch(gate_up: Tensor, kind: str) -> Tensor:
    num_tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * n and gate_up.stride(1) == 1
    out = torch.empty((num_tokens, n), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(power_of_two(n), _MAX_BLOCK)
        _gate_kernel[(num_tokens, -(-n // block))](
            gate_up, out, gate_up.stride(0), N=n, KIND=kind, BLOCK=block, num_warps=max(1, block // 256)
        )
    return out
