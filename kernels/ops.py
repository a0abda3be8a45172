"""``select_ops`` chooses, once, the implementation of every op for a device."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import eager, linear
from .cpu import CpuOps, Unavailable


@dataclass(frozen=True)
class Ops:
    """One implementation of each op; a module keeps the ones that it uses. Signatures: `kernels/eager.py`."""

    name: str
    bind_linear: Callable[[Tensor], linear.Linear]  # weight [out, in] -> the product with it; `kernels/linear.py`
    bind_shared_linear: Callable[[Tensor], linear.Linear]  # the same for a weight that others read too
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    rotary_store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    embedding: Callable[[Tensor, Tensor, int], Tensor]
    counter_noise: Callable[[Tensor, Tensor], Tensor]


EAGER = Ops(
    name="eager",
    bind_linear=linear.bind_plain,
    bind_shared_linear=linear.bind_plain,
    add_rms_norm=eager.add_rms_norm,
    silu_and_mul=eager.silu_and_mul,
    rotary_store_kv=eager.rotary_store_kv,
    embedding=eager.embedding,
    counter_noise=eager.counter_noise,
)


def select_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest ops that run on this device with this dtype; the name says which, and why no better ones."""
    if device.type != "cpu":
        return EAGER
    ops = EAGER
    try:
        compiled = CpuOps(dtype)
        ops = replace(
            ops,
            name="C++",
            add_rms_norm=compiled.add_rms_norm,
            silu_and_mul=compiled.silu_and_mul,
            rotary_store_kv=compiled.rotary_store_kv,
        )
    except Unavailable as reason:
        ops = replace(ops, name=f"eager ({reason})")
    if linear.packs(device, dtype):
        ops = replace(
            ops,
            name=f"{ops.name}, packed linear",
            bind_linear=linear.bind_packed,
            bind_shared_linear=linear.bind_shared,
        )
    return ops
