"""Qwen3: each head of query and key is normalised."""

from .base import QKNorm
from .policy import Policy

QWEN3 = Policy(architectures=("Qwen3ForCausalLM",), has_windows=True, qk_norm=QKNorm.HEAD)
