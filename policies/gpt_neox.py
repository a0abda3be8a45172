"""GPT-NeoX and Pythia: query, key and value in one tensor, head by head; attention and MLP side by side."""

from .base import Residual
from .policy import Fused, Layout, Policy

GPT_NEOX = Policy(
    architectures=("GPTNeoXForCausalLM",),
    ignored=(r".*rotary_emb\.inv_freq", r".*\.attention\.(masked_)?bias"),
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    qkv=Fused("attention.query_key_value", Layout.GROUPED),
    output="attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    mlp_bias=True,
    rotates_in_part=True,
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.layer_norm_eps,
    residual=lambda config: Residual.PARALLEL if config.use_parallel_residual else Residual.SEQUENTIAL,
)
