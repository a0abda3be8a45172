"""DeepSeek-V2 and V3: latent attention; after some dense layers, a mixture of experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .base import Policy, read
from .latent import LatentSpec, read_latent


def _latent_v2(config: Any, layer: int, rotary: Callable[[int], int]) -> LatentSpec:
    return read_latent(config, rotary(layer), interleaved=True)


def _latent_v3(config: Any, layer: int, rotary: Callable[[int], int]) -> LatentSpec:
    return read_latent(config, rotary(layer), interleaved=bool(read(config, "rope_interleave", False)))


def _refusal(config: Any) -> str | None:
    if read(config, "attention_bias", False) and config.q_lora_rank is None:
        return "attention_bias=True and no q_lora_rank"
    return None


DEEPSEEK_V2 = Policy(
    architectures=("DeepseekV2ForCausalLM",),
    refusal=_refusal,
    num_kv_heads=None,  # the config's says nothing: there is one latent, and keys are made for every head
    attention_of=_latent_v2,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    architectures=("DeepseekV3ForCausalLM",),
    mlp_bias=False,
    attention_of=_latent_v3,
    ignored=(*DEEPSEEK_V2.ignored, r"model\.layers\.61\..*"),  # multi-token prediction
)
