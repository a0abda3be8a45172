"""Llama 1 to 3.x, SmolLM and SmolLM2: the shape that the vocabulary's defaults describe."""

from .policy import Policy

LLAMA = Policy(architectures=("LlamaForCausalLM",))
