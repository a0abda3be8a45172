"""Qwen3: each head of query and key is normalised."""

from .base import Policy, QKNorm

QWEN3 = Policy(architectures=("Qwen3ForCausalLM",), qk_norm=QKNorm.HEAD)
