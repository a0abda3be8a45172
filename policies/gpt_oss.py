"""GPT-OSS: experts with biases, a sink in each head's softmax, windows in turns."""

from typing import Any

from .base import Policy
from .experts import MoESpec, RouterSpec


def _experts(config: Any, layer: int) -> MoESpec:
    return MoESpec(
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        router=RouterSpec(config.num_experts_per_tok, "mlp.router", bias=True, scoring="softmax of chosen"),
        activation="swiglu_oai",
        bias=True,
        transposed=True,
    )


GPT_OSS = Policy(architectures=("GptOssForCausalLM",), sinks="self_attn.sinks", mlp_of=_experts)
