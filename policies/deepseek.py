"""DeepSeek-V2 and V3: latent attention; after some dense layers, a mixture of experts with groups of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .experts import MoESpec, RouterSpec, SharedExpertSpec
from .latent import LatentSpec, read_latent
from .policy import Policy, read


def _latent_v2(config: Any, layer: int, rotary: Callable[[int], int]) -> LatentSpec:
    return read_latent(config, rotary(layer), interleaved=True)


def _latent_v3(config: Any, layer: int, rotary: Callable[[int], int]) -> LatentSpec:
    return read_latent(config, rotary(layer), interleaved=bool(config.rope_interleave))


def _experts_v2(config: Any, layer: int) -> MoESpec | None:
    in_groups = config.topk_method == "group_limited_greedy"
    router = RouterSpec(
        config.num_experts_per_tok,
        float32=True,
        scale=config.routed_scaling_factor,
        num_groups=read(config, "n_group", 1) if in_groups else 1,
        top_groups=read(config, "topk_group", 1) if in_groups else 1,
    )
    return _experts(config, layer, router, bias=config.mlp_bias)


def _experts_v3(config: Any, layer: int) -> MoESpec | None:
    router = RouterSpec(
        config.num_experts_per_tok,
        float32=True,
        correction="mlp.gate.e_score_correction_bias",
        scoring="sigmoid",
        normalise=bool(config.norm_topk_prob),
        scale=config.routed_scaling_factor,
        num_groups=read(config, "n_group", 1),
        top_groups=read(config, "topk_group", 1),
        group_score="sum of two",
    )
    return _experts(config, layer, router, bias=False)


def _experts(config: Any, layer: int, router: RouterSpec, bias: bool) -> MoESpec | None:
    if layer < read(config, "first_k_dense_replace", 0):
        return None
    size = config.moe_intermediate_size
    return MoESpec(
        num_experts=config.n_routed_experts,
        hidden_size=config.hidden_size,
        intermediate_size=size,
        router=router,
        activation=config.hidden_act,
        shared=SharedExpertSpec(size * config.n_shared_experts, bias=bias),
    )


def _refusal(config: Any, scoring: str) -> str | None:
    if (asked := read(config, "scoring_func", scoring)) != scoring:
        return f"scoring_func={asked}"
    if read(config, "attention_bias", False) and config.q_lora_rank is None:
        return "attention_bias=True and no q_lora_rank"
    return None


def _refusal_v2(config: Any) -> str | None:
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        return f"topk_method={config.topk_method}"
    if config.norm_topk_prob:
        return "norm_topk_prob=True (transformers does not normalise either)"
    return _refusal(config, "softmax")


def _refusal_v3(config: Any) -> str | None:
    return _refusal(config, "sigmoid")


DEEPSEEK_V2 = Policy(
    architectures=("DeepseekV2ForCausalLM",),
    refusal=_refusal_v2,
    num_kv_heads=None,  # the config's says nothing: keys are made for every head
    attention_of=_latent_v2,
    mlp_of=_experts_v2,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    architectures=("DeepseekV3ForCausalLM",),
    refusal=_refusal_v3,
    mlp_bias=False,
    attention_of=_latent_v3,
    mlp_of=_experts_v3,
    ignored=(*DEEPSEEK_V2.ignored, r"model\.layers\.61\..*"),  # predicts a second token
)
