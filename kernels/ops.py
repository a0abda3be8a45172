"""``select_ops`` chooses, once, the implementation of every op for a device."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from . import eager, eager_moe, eager_sample, linear
from .cpu import CpuLinear, CpuOps, Unavailable
from .eager_moe import ExpertPlan, GroupedLinear, Routing


@dataclass(frozen=True)
class Ops:
    """One implementation of each op; a module keeps the ones that it uses. Signatures: `eager*.py`."""

    name: str
    bind_linear: linear.BindLinear
    bind_gated_linear: linear.BindGatedLinear
    # of an embedding's weight, and whether that stays
    bind_tied_linear: Callable[[Tensor, bool], tuple[linear.Linear, linear.LookUp | None]]
    rms_norm: Callable[..., Tensor]  # ...: the last argument has a default
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    add_layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]]
    head_layer_norm: Callable[[Tensor, Tensor, float], Tensor]
    activation: Callable[[str], eager.Activation]  # of a kind
    gated_activation: Callable[[str], eager.Activation]
    rotary_store_kv: Callable[..., Tensor]
    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    embedding: Callable[[Tensor, Tensor, int], Tensor]
    route: Callable[[Tensor, Routing, Tensor | None], tuple[Tensor, Tensor]]
    plan_experts: Callable[[Tensor, int, int], ExpertPlan]
    bind_grouped_linear: Callable[[Tensor], GroupedLinear]  # weight [experts, out, in] -> the product with it
    combine: Callable[[Tensor, Tensor, ExpertPlan], Tensor]
    counter_noise: Callable[[Tensor, Tensor], Tensor]
    sample_shard: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    likeliest: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]]
    draw_filtered: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    apply_bitmask: Callable[[Tensor, Tensor | None, Tensor, int], None]


EAGER = Ops(
    name="eager",
    bind_linear=linear.bind_plain,
    bind_gated_linear=partial(linear.bind_plain_gated, gated_activation=eager.gated_activation),
    bind_tied_linear=linear.bind_plain_tied,
    rms_norm=eager.rms_norm,
    add_rms_norm=eager.add_rms_norm,
    add_layer_norm=eager.add_layer_norm,
    head_layer_norm=eager.head_layer_norm,
    activation=eager.activation,
    gated_activation=eager.gated_activation,
    rotary_store_kv=eager.rotary_store_kv,
    store_kv=eager.store_kv,
    embedding=eager.embedding,
    route=eager_moe.route,
    plan_experts=eager_moe.plan_experts,
    bind_grouped_linear=eager_moe.bind_grouped_linear,
    combine=eager_moe.combine,
    counter_noise=eager_sample.counter_noise,
    sample_shard=eager_sample.sample_shard,
    likeliest=eager_sample.likeliest,
    draw_filtered=eager_sample.draw_filtered,
    apply_bitmask=eager_sample.apply_bitmask,
)


def select_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """The fastest ops that run on this device with this dtype; the name says which, and why no better ones."""
    if device.type == "cuda":
        return _triton(device, dtype)
    if device.type != "cpu":
        return EAGER
    products: CpuLinear | None = None
    try:
        ops, products = _compiled(CpuOps(dtype)), CpuLinear(dtype)
    except Unavailable as why:
        ops = replace(EAGER, name=f"eager ({why})")
    reason = linear.why_plain(device, dtype)
    if reason is not None:
        return replace(ops, name=f"{ops.name}, plain linear ({reason})")
    return replace(
        ops,
        name=f"{ops.name}, {'packed' if products is None or not products.compacts else 'compact'} linear",
        bind_linear=partial(linear.bind, ours=products),
        bind_gated_linear=partial(linear.bind_gated, ours=products, gated_activation=ops.gated_activation),
        bind_tied_linear=partial(linear.bind_tied, ours=products),
    )


def _compiled(compiled: CpuOps) -> Ops:
    """Those of C++, the rest eager."""
    return replace(
        EAGER,
        name="C++",
        rms_norm=compiled.rms_norm,
        add_rms_norm=compiled.add_rms_norm,
        add_layer_norm=compiled.add_layer_norm,
        head_layer_norm=compiled.head_layer_norm,
        activation=compiled.activation,
        gated_activation=compiled.gated_activation,
        bind_gated_linear=partial(linear.bind_plain_gated, gated_activation=compiled.gated_activation),
        rotary_store_kv=compiled.rotary_store_kv,
        store_kv=compiled.store_kv,
        route=compiled.route,
        plan_experts=compiled.plan_experts,
        bind_grouped_linear=compiled.bind_grouped_linear,
        combine=compiled.combine,
        counter_noise=compiled.counter_noise,
        sample_shard=compiled.sample_shard,
        likeliest=compiled.likeliest,
        draw_filtered=compiled.draw_filtered,
        apply_bitmask=compiled.apply_bitmask,
    )


def _triton(device: torch.device, dtype: torch.dtype) -> Ops:
    """The Triton kernels where they run, which needs the package, a compiler and a device that knows the dtype: tried
    on the smallest of them."""
    try:
        from .triton_ops import TRITON

        TRITON.gated_activation("silu")(torch.ones(1, 2, dtype=dtype, device=device))
    except Exception as error:
        reason = " ".join(str(error).split())
        warnings.warn(f"Triton's kernels do not run on {device}, plain torch does their work: {reason}", stacklevel=3)
        return replace(EAGER, name=f"eager ({reason})")
    return TRITON
