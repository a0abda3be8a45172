"""Mistral: Llama with a sliding window."""

from .policy import Policy

MISTRAL = Policy(architectures=("MistralForCausalLM", "MinistralForCausalLM"), has_windows=True)
