"""Qwen2 and 2.5: biases on query, key and value alone."""

from .policy import Policy

QWEN2 = Policy(architectures=("Qwen2ForCausalLM",), has_windows=True, qkv_bias=True, output_bias=False)
