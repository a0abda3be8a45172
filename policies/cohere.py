"""Cohere's Command R, R+ and A: attention and MLP side by side behind one norm about the mean, neighbours rotate."""

from dataclasses import replace

from .base import QKNorm, Residual
from .policy import Policy, layer_type

COHERE = Policy(
    architectures=("CohereForCausalLM",),
    is_rms=False,
    norm_eps=lambda config: config.layer_norm_eps,
    mlp_norm=None,
    residual=Residual.PARALLEL,
    interleaved=True,
    qk_norm=lambda config: QKNorm.HEAD_LAYER if config.use_qk_norm else None,
    logits_multiplier=lambda config: config.logit_scale,
)
COHERE2 = replace(
    COHERE,
    architectures=("Cohere2ForCausalLM",),
    qk_norm=None,
    has_windows=True,
    rotates=lambda config, layer: layer_type(config, layer) == "sliding_attention",
)
