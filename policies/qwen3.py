"""Qwen3: each head of query and key is normalised."""

from .base import Policy, QKNorm

QWEN3 = Policy(architectures=("Qwen3ForCausalLM",), has_windows=True, qk_norm=QKNorm.HEAD)
