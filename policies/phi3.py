"""Phi-3, Phi-3.5 and Phi-4 (text): query, key and value in one tensor, gate and up in another."""

from .policy import Fused, Policy

PHI3 = Policy(
    architectures=("Phi3ForCausalLM",),
    qkv=Fused("self_attn.qkv_proj"),
    gate_up="mlp.gate_up_proj",
    has_windows=True,
    rotates_in_part=True,
    qkv_bias=False,
    output_bias=False,
)
