"""OPT and Galactica: learned positions from row 2 on; the 350M model normalises after, and is narrower at its ends."""

from typing import Any

from .base import Residual
from .policy import Policy


def _projection(name: str) -> Any:
    return lambda config: None if config.word_embed_proj_dim == config.hidden_size else name


OPT = Policy(
    architectures=("OPTForCausalLM",),
    config_names={"intermediate_size": "ffn_dim"},
    embedding="model.decoder.embed_tokens",
    embedding_size=lambda config: config.word_embed_proj_dim,
    embedding_projection=_projection("model.decoder.project_in"),
    positions="model.decoder.embed_positions",
    first_position=2,
    layers="model.decoder.layers",
    final_norm=lambda config: (
        "model.decoder.final_layer_norm"
        if config.do_layer_norm_before and not config._remove_final_layer_norm
        else None
    ),
    head_projection=_projection("model.decoder.project_out"),
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    output="self_attn.out_proj",
    gate=None,
    up="fc1",
    down="fc2",
    qkv_bias=lambda config: config.enable_bias,
    output_bias=lambda config: config.enable_bias,
    mlp_bias=lambda config: config.enable_bias,
    is_rms=False,
    norm_eps=1e-5,
    norm_weight=lambda config: config.layer_norm_elementwise_affine,
    norm_bias=lambda config: config.layer_norm_elementwise_affine,
    residual=lambda config: Residual.SEQUENTIAL if config.do_layer_norm_before else Residual.POST_NORM,
    activation=lambda config: config.activation_function,
    rotates=lambda config, layer: False,
)
