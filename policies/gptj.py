"""GPT-J: attention and MLP side by side behind one norm; a part of each head rotates, neighbour by neighbour."""

from .base import Residual
from .policy import Policy

GPTJ = Policy(
    architectures=("GPTJForCausalLM",),
    config_names={"intermediate_size": "n_inner"},
    ignored=(r".*\.attn\.(masked_)?bias", r".*\.attn\.embed_positions"),
    embedding="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    input_norm="ln_1",
    mlp_norm=None,
    query="attn.q_proj",
    key="attn.k_proj",
    value="attn.v_proj",
    output="attn.out_proj",
    gate=None,
    up="mlp.fc_in",
    down="mlp.fc_out",
    mlp_bias=True,
    head_bias=True,
    is_rms=False,
    norm_bias=True,
    norm_eps=lambda config: config.layer_norm_epsilon,
    residual=Residual.PARALLEL,
    activation=lambda config: config.activation_function,
    interleaved=True,
    rotates_in_part=True,
)
