"""Granite 3: a multiplier for embeddings, scores, residuals and logits."""

from .policy import Policy

GRANITE = Policy(
    architectures=("GraniteForCausalLM",),
    scale=lambda config, layer: config.attention_multiplier,
    embedding_multiplier=lambda config: config.embedding_multiplier,
    residual_multiplier=lambda config: config.residual_multiplier,
    logits_multiplier=lambda config: 1 / config.logits_scaling,
)
