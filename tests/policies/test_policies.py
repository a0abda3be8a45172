"""What policies declare, against transformers' own modules."""

import re
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from meshlm.policies import DecoderSpec, MultiHeadSpec, find_policy, supported_architectures
from meshlm.policies.registry import POLICIES
from meshlm.shardformer.checkpoint import read_rotary
from tiny import llama_config


def spec_of(config: LlamaConfig) -> DecoderSpec:
    return find_policy(["LlamaForCausalLM"]).spec(config, read_rotary)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 10, "num_key_value_heads": 1},
        {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 9},
    ],
    ids=str,
)
def test_a_spec_names_and_sizes_every_tensor(values: dict[str, Any]) -> None:
    config = llama_config(**values)
    spec = spec_of(config)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    if spec.tied_embeddings:
        del state["lm_head.weight"]
    assert len(spec.shapes()) == len(list(spec.tensors())), "each once"
    assert spec.shapes() == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name] in supported_architectures()])
def test_the_declared_tensors_are_the_family_s(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    spec = find_policy([FAMILIES[family]]).spec(config, read_rotary)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert spec.shapes() == {
        name: shape for name, shape in shapes.items() if not any(re.fullmatch(p, name) for p in spec.ignored)
    }
    assert all(len(tensor.shape) == len(tensor.dims) for tensor in spec.tensors())


def test_a_spec_s_numbers() -> None:
    spec = spec_of(llama_config(rms_norm_eps=0.01, dtype=torch.bfloat16))
    assert (spec.architecture, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("LlamaForCausalLM", 3, 9, 3)
    assert (spec.attention_kinds[0].head_dim, spec.norm.eps, spec.dtype) == (4, 0.01, "bfloat16")
    assert (spec.max_position_embeddings, spec.tied_embeddings) == (64, False)
    attention = spec.layers[0].attention
    assert isinstance(attention, MultiHeadSpec) and (attention.query.sizes, attention.key.sizes) == ((36, 36), (12, 36))
    assert spec.layers[0] is spec.layers[2], "layers that are alike are one object"
    (rotary,) = spec.rotaries
    assert isinstance(hash(rotary), int) and rotary.max_positions is None


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 777.0},
    {"rope_type": "linear", "rope_theta": 777.0, "factor": 2.5},
    {"rope_type": "yarn", "rope_theta": 777.0, "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "rope_theta": 777.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


@pytest.mark.parametrize("head_dim", [None, 10])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int | None) -> None:
    config = llama_config(rope_parameters=dict(rope), **({"head_dim": head_dim} if head_dim else {}))
    rotary = LlamaForCausalLM(config).model.rotary_emb
    (spec,) = spec_of(config).rotaries
    assert len(spec.inv_freq) == (head_dim or 4) // 2
    assert torch.equal(torch.tensor(spec.inv_freq), rotary.inv_freq)
    assert spec.scaling == rotary.attention_scaling
    assert spec.max_positions is None


def test_every_registered_architecture_is_found_and_is_one_of_transformers() -> None:
    import transformers

    names = supported_architectures()
    assert names == sorted(set(names)) and "LlamaForCausalLM" in names
    assert len(names) == sum(len(policy.architectures) for policy in POLICIES), "each has one policy"
    for name in names:
        assert name in find_policy([name]).architectures
        assert hasattr(transformers, name)


def test_others_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError) as error:
        find_policy(["Llama9ForCausalLM"])
    assert str(error.value).startswith(
        "architecture Llama9ForCausalLM is not supported; nearest supported: LlamaForCausalLM, "
    )
    with pytest.raises(ValueError, match=r"^config\.json names no architecture$"):
        find_policy([])


def test_one_of_several_architectures_is_enough() -> None:
    assert find_policy(["Other", "LlamaForCausalLM"]) is find_policy(["LlamaForCausalLM"])
