"""BLOOM: ALiBi instead of positions, a norm behind the embedding."""

from typing import Any

from .policy import Fused, Layout, Policy


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8/n), 2^(-16/n), … for n heads, n a power of two; the rest from between those of twice as many
    (Press et al. 2022)."""
    closest = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / closest) for i in range(closest)]
    between = [2 ** (-8 * (i + 1) / (2 * closest)) for i in range(0, 2 * closest, 2)]
    return tuple((slopes + between)[:num_heads])


def _refusal(config: Any) -> str | None:
    field = "apply_residual_connection_post_layernorm"
    return f"{field}=True" if getattr(config, field) else None


BLOOM = Policy(
    architectures=("BloomForCausalLM",),
    config_names={"max_position_embeddings": "seq_length"},
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    qkv=Fused("self_attention.query_key_value", Layout.GROUPED),
    output="self_attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.layer_norm_epsilon,
    activation="gelu_new",
    alibi=lambda config: alibi_slopes(config.num_attention_heads),
    refusal=_refusal,
)
