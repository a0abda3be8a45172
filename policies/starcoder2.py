"""StarCoder2: norms about the mean, biases, an MLP without a gate."""

from .policy import Policy

STARCODER2 = Policy(
    architectures=("Starcoder2ForCausalLM",),
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.norm_epsilon,
    qkv_bias=lambda config: config.use_bias,
    output_bias=lambda config: config.use_bias,
    mlp_bias=lambda config: config.use_bias,
    has_windows=True,
    gate=None,
    up="mlp.c_fc",
    down="mlp.c_proj",
)
