"""Qwen2-MoE and Qwen3-MoE: experts in most layers, Qwen2's beside one that all tokens use."""

from dataclasses import replace
from typing import Any

from .experts import MoESpec, RouterSpec, SharedExpertSpec
from .policy import read
from .qwen2 import QWEN2
from .qwen3 import QWEN3


def _experts(config: Any, layer: int) -> MoESpec | None:
    if layer in config.mlp_only_layers or config.num_experts == 0 or (layer + 1) % config.decoder_sparse_step:
        return None
    shared = read(config, "shared_expert_intermediate_size")
    return MoESpec(
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        router=RouterSpec(config.num_experts_per_tok, normalise=config.norm_topk_prob),
        activation=config.hidden_act,
        shared=SharedExpertSpec(shared, "mlp.shared_expert", gate="mlp.shared_expert_gate") if shared else None,
    )


QWEN2_MOE = replace(
    QWEN2,
    architectures=("Qwen2MoeForCausalLM",),
    qkv_bias=lambda config: config.qkv_bias,
    mlp_of=_experts,
)
QWEN3_MOE = replace(QWEN3, architectures=("Qwen3MoeForCausalLM",), mlp_of=_experts)
