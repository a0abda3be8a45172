"""Mistral: Llama with a sliding window."""

from .base import Policy

MISTRAL = Policy(architectures=("MistralForCausalLM", "MinistralForCausalLM"), has_windows=True)
