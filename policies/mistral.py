"""Mistral: Llama with a sliding window, which the defaults read from the config."""

from .base import Policy

MISTRAL = Policy(architectures=("MistralForCausalLM", "MinistralForCausalLM"))
