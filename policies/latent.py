"""The words for multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

from .base import AttentionKind, Dim, Module, TensorSpec
from .policy import read


@dataclass(frozen=True)
class LatentSpec:
    """Attention whose keys and values are made of one latent vector a token, which alone is cached.

    query    [heads, nope_dim + rotary_dim]             from the hidden state, through a norm of its own if it is narrow
    key      [rotary_dim] that all heads share, and     latent @ expansion[head, :nope_dim]
    value                                               latent @ expansion[head, nope_dim:]
    """

    kind: AttentionKind
    nope_dim: int  # elements of a query head that do not rotate
    rotary_dim: int
    value_dim: int  # of a head, once it is expanded
    query_down: Module | None  # to what `query` takes; None: that takes the hidden state
    query_norm: Module | None
    query: Module
    latent: Module  # to latent and rotary part of the key
    latent_norm: Module
    expansion: Module  # [heads * (nope_dim + value_dim), latent]
    output: Module
    norm_eps: float
    rotary: int  # which of the model's
    interleaved: bool  # which elements rotate together

    def tensors(self, prefix: str) -> Iterator[TensorSpec]:
        for module in (
            self.query_down,
            self.query_norm,
            self.query,
            self.latent,
            self.latent_norm,
            self.expansion,
            self.output,
        ):
            if module is not None:
                yield from module.tensors(prefix)


def read_latent(config: Any, rotary: int, interleaved: bool, prefix: str = "self_attn.") -> LatentSpec:
    """With the fields' and modules' names of transformers' DeepSeek-V2 and V3."""
    h, q = Dim.HIDDEN, Dim.QUERY
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, turning, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query_rank, bias = config.q_lora_rank, bool(read(config, "attention_bias", False))
    down = query_rank is not None
    return LatentSpec(
        kind=AttentionKind(
            head_dim=turning + rank,
            scale=(nope + turning) ** -0.5 * _yarn_scale(config.rope_parameters),
            value_dim=rank,
            is_latent=True,
        ),
        nope_dim=nope,
        rotary_dim=turning,
        value_dim=value,
        query_down=Module(f"{prefix}q_a_proj", (h, h), (query_rank, hidden), bias) if down else None,
        query_norm=Module(f"{prefix}q_a_layernorm", (h,), (query_rank,)) if down else None,
        query=Module(
            f"{prefix}q_b_proj" if down else f"{prefix}q_proj",
            (q, h),
            (heads * (nope + turning), query_rank if down else hidden),
        ),
        latent=Module(f"{prefix}kv_a_proj_with_mqa", (h, h), (rank + turning, hidden), bias),
        latent_norm=Module(f"{prefix}kv_a_layernorm", (h,), (rank,)),
        expansion=Module(f"{prefix}kv_b_proj", (q, h), (heads * (nope + value), rank)),
        output=Module(f"{prefix}o_proj", (h, q), (hidden, heads * value), bias),
        norm_eps=1e-6,  # these norms do not hear the config's
        rotary=rotary,
        interleaved=interleaved,
    )


def _yarn_scale(rope_parameters: dict[str, Any]) -> float:
    """What yarn multiplies scores with, beside its scaling of cos and sin (arXiv 2309.00071, section 3.4)."""
    of_all_dims = rope_parameters.get("mscale_all_dim", 0)
    if rope_parameters.get("rope_type", "default") == "default" or not of_all_dims or rope_parameters["factor"] <= 1:
        return 1.0
    return float(0.1 * of_all_dims * log(rope_parameters["factor"]) + 1.0) ** 2
