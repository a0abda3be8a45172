"""Mixtral: Mistral with experts for an MLP."""

from typing import Any

from .experts import MoESpec, RouterSpec
from .policy import Policy


def _experts(config: Any, layer: int) -> MoESpec:
    return MoESpec(
        num_experts=config.num_local_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        router=RouterSpec(config.num_experts_per_tok, normalise=True),
        activation=config.hidden_act,
    )


MIXTRAL = Policy(architectures=("MixtralForCausalLM",), has_windows=True, mlp_of=_experts)
