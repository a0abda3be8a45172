"""Falcon 7B, 40B and 180B: attention and MLP side by side, query, key and value in one tensor."""

from typing import Any

from .base import Residual
from .policy import Fused, Layout, Policy


def _qkv(config: Any) -> Fused:
    one_kv_head = config.multi_query and not config.new_decoder_architecture
    return Fused("self_attention.query_key_value", Layout.PACKED if one_kv_head else Layout.GROUPED)


def _has_two_norms(config: Any) -> bool:
    return bool(config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2))


def _input_norm(config: Any) -> str:
    return "ln_attn" if _has_two_norms(config) else "input_layernorm"


def _mlp_norm(config: Any) -> str | None:
    if _has_two_norms(config):
        return "ln_mlp"
    return None if config.parallel_attn else "post_attention_layernorm"


def _refusal(config: Any) -> str | None:
    if config.alibi:
        return "alibi=True (transformers rounds its biases to bfloat16, which our attention does not)"
    if config.new_decoder_architecture and not config.parallel_attn:
        return "new_decoder_architecture=True and parallel_attn=False"
    return None


FALCON = Policy(
    architectures=("FalconForCausalLM",),
    config_names={"intermediate_size": "ffn_hidden_size"},
    embedding="transformer.word_embeddings",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    input_norm=_input_norm,
    mlp_norm=_mlp_norm,
    qkv=_qkv,
    output="self_attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    qkv_bias=lambda config: config.bias,
    output_bias=lambda config: config.bias,
    mlp_bias=lambda config: config.bias,
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.layer_norm_epsilon,
    num_kv_heads=lambda config: config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1,
    residual=lambda config: Residual.PARALLEL if config.parallel_attn else Residual.SEQUENTIAL,
    activation=lambda config: config.activation,
    refusal=_refusal,
)
