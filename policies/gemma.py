"""Gemma 1, 2 and 3 (text): norms with an offset, scaled embeddings.

From 2 on norms before and after, softcaps, windows in turns; from 3 on normalised heads and a RoPE for each kind of
layer.
"""

from dataclasses import replace

from .base import QKNorm
from .policy import Policy, read

GEMMA = Policy(
    architectures=("GemmaForCausalLM",),
    norm_offset=1.0,
    embedding_multiplier=lambda config: config.hidden_size**0.5,
    refusal=lambda config: "use_bidirectional_attention=True" if config.use_bidirectional_attention else None,
)
GEMMA2 = replace(
    GEMMA,
    architectures=("Gemma2ForCausalLM",),
    activation=lambda config: config.hidden_activation,
    has_windows=True,
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    scale=lambda config, layer: config.query_pre_attn_scalar**-0.5,
    softcap=lambda config: read(config, "attn_logit_softcapping"),
    logits_softcap=lambda config: read(config, "final_logit_softcapping"),
)
GEMMA3 = replace(
    GEMMA2,
    architectures=("Gemma3ForCausalLM",),
    qk_norm=QKNorm.HEAD,
    softcap=None,  # which transformers leaves out too, whatever the config says
)
