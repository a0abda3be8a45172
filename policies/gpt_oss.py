"""GPT-OSS: experts with biases, a sink in each head's softmax, windows in turns."""

from typing import Any

from .experts import MoESpec, RouterSpec
from .policy import Policy, read


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


def _refusal(config: Any) -> str | None:
    """The activation's numbers are fixed."""
    alpha, limit = read(config, "swiglu_alpha", 1.702), read(config, "swiglu_limit", 7.0)
    return None if (alpha, limit) == (1.702, 7.0) else f"swiglu_alpha={alpha}, swiglu_limit={limit}"


GPT_OSS = Policy(
    architectures=("GptOssForCausalLM",),
    has_windows=True,
    sinks="self_attn.sinks",
    mlp_of=_experts,
    refusal=_refusal,
)
