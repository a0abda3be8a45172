"""SmolLM3: some layers do not rotate."""

from .policy import Policy

SMOLLM3 = Policy(
    architectures=("SmolLM3ForCausalLM",),
    has_windows=True,
    rotates=lambda config, layer: bool(config.no_rope_layers[layer]),  # 1: the layer does rotate
)
