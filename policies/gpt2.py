"""GPT-2: learned positions, weights stored as input × output."""

from typing import Any

from .policy import Fused, Policy


def _scale(config: Any, layer: int) -> float:
    size = config.hidden_size // config.num_attention_heads
    scale: float = size**-0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


GPT2 = Policy(
    architectures=("GPT2LMHeadModel",),
    config_names={"intermediate_size": "n_inner"},
    ignored=(r".*\.attn\.(masked_)?bias",),  # causal masks, in old checkpoints
    embedding="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    input_norm="ln_1",
    mlp_norm="ln_2",
    qkv=Fused("attn.c_attn"),
    output="attn.c_proj",
    gate=None,
    up="mlp.c_fc",
    down="mlp.c_proj",
    transposed=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.layer_norm_epsilon,
    activation=lambda config: config.activation_function,
    scale=_scale,
    rotates=lambda config, layer: False,
    refusal=lambda config: "add_cross_attention=True" if config.add_cross_attention else None,
)
