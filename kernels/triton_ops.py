"""Every op as a Triton kernel, for GPUs; matrix products and the search for the likeliest tokens stay torch's.

This imports triton, which not every machine has and no CPU needs: `ops.select_ops` imports it late.
"""

from functools import partial

from torch import Tensor

from . import eager_sample, linear
from .activation import activation, gated_activation
from .bitmask import apply_bitmask
from .eager_sample import likeliest
from .embedding import embedding
from .experts import combine, plan_experts
from .grouped_linear import bind_grouped_linear
from .layer_norm import add_layer_norm, head_layer_norm
from .ops import Ops
from .rms_norm import add_rms_norm, rms_norm
from .rotary import rotary_store_kv, store_kv
from .route import route
from .sample import counter_noise, sample_shard


def draw_filtered(values: Tensor, token_ids: Tensor, limits: Tensor, filters: Tensor, keys: Tensor) -> Tensor:
    """`eager_sample.draw_filtered`, with the kernel's noise."""
    return eager_sample.draw_filtered(values, token_ids, limits, filters, keys, counter_noise)


TRITON = Ops(
    name="triton",
    bind_linear=linear.bind_plain,
    bind_gated_linear=partial(linear.bind_plain_gated, gated_activation=gated_activation),
    bind_tied_linear=linear.bind_plain_tied,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    add_layer_norm=add_layer_norm,
    head_layer_norm=head_layer_norm,
    activation=activation,
    gated_activation=gated_activation,
    rotary_store_kv=rotary_store_kv,
    store_kv=store_kv,
    embedding=embedding,
    route=route,
    plan_experts=plan_experts,
    bind_grouped_linear=bind_grouped_linear,
    combine=combine,
    counter_noise=counter_noise,
    sample_shard=sample_shard,
    likeliest=likeliest,
    draw_filtered=draw_filtered,
    apply_bitmask=apply_bitmask,
)
