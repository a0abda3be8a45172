"""GLM-4 and GLM-4-0414: half of each head rotates, neighbour by neighbour; gate and up in one tensor."""

from dataclasses import replace

from .policy import Policy

GLM = Policy(
    architectures=("GlmForCausalLM",),
    gate_up="mlp.gate_up_proj",
    output_bias=False,
    interleaved=True,
    rotates_in_part=True,
)
GLM4 = replace(
    GLM,
    architectures=("Glm4ForCausalLM",),
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)
