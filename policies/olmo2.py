"""OLMo 2: norms after attention and MLP alone, and of all heads of query and key together."""

from .base import QKNorm
from .policy import Policy

OLMO2 = Policy(
    architectures=("Olmo2ForCausalLM",),
    input_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
    qk_norm=QKNorm.FULL,
)
