"""Checkpoints as transformers saves them, read as transformers' modules hold them, slice by slice."""

import pickle
import random
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping, core_model_loading, modeling_utils
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    PermuteForRope,
    Transpose,
    WeightConverter,
    WeightRenaming,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meshlm.shardformer import checkpoint, open_checkpoint
from meshlm.shardformer.conversion import converted
from meshlm.shardformer.shard import Range
from meshlm.shardformer.sources import SafetensorsSource, Virtual, VirtualSource
from meshlm.shardformer.sources.virtual import concatenate, stack
from meshlm.shardformer.weights import CheckpointError, WeightSource
from tiny import make_llama

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 37,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 12,  # more than nine: ten comes before two in the alphabet
    "num_local_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "shared_expert_intermediate_size": 14,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_group": 2,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {  # by transformers' model_type
    "bloom": {"n_head": 4, "n_layer": 2},
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 12, "moe_k": 2, "moe_layer_start_index": 1},
    "falcon": {},
    "glm4_moe": EXPERTS,
    "gpt2": {},
    "gpt_oss": {**EXPERTS, "head_dim": 8},
    "granitemoe": EXPERTS,
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": [2, 2], "num_shared_expert": [1, 1], "head_dim": 8},
    "jetmoe": {**EXPERTS, "kv_channels": 6, "num_key_value_heads": 2, "num_attention_heads": 4},
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "phi3": {},
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
}


def make(model_type: str, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, **FAMILIES.get(model_type, {}), **values}
    if model_type in ("bloom", "gpt2"):
        sizes = {name: value for name, value in sizes.items() if name != "intermediate_size"}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def random_ranges(shape: tuple[int, ...], generator: random.Random) -> tuple[Range, ...]:
    return tuple((start := generator.randrange(size), generator.randint(start + 1, size)) for size in shape)


def read(source: WeightSource, name: str, ranges: tuple[Range, ...]) -> Tensor:
    out = torch.full([stop - start for start, stop in ranges], float("nan"))
    source.read(name, ranges, out)
    return out


def assert_holds(source: WeightSource, model: PreTrainedModel) -> None:
    """Every tensor of the model, tied ones once, whole and in slices; and no more than a slice is read."""
    state = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    source, generator = pickle.loads(pickle.dumps(source)), random.Random(0)
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        for ranges in (tuple((0, size) for size in shape), random_ranges(shape, generator)):
            before = source.bytes_read
            assert torch.equal(read(source, name, ranges), tensor[tuple(slice(*r) for r in ranges)]), (name, ranges)
            assert source.bytes_read - before == 4 * prod(stop - start for start, stop in ranges)
    source.close()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_as_transformers_saves_it(model_type: str, tmp_path: Path) -> None:
    model = make(model_type)
    model.save_pretrained(tmp_path)
    assert_holds(converted(SafetensorsSource(tmp_path), model.config), model)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe", "lfm2_moe", "mixtral", "phimoe", "qwen2_moe"])
def test_these_are_not_saved_as_they_are_held(model_type: str, tmp_path: Path) -> None:
    """What makes the test above one: experts lie in the file one by one."""
    model = make(model_type)
    model.save_pretrained(tmp_path)
    assert not set(model.state_dict()) - set(model.all_tied_weights_keys) <= set(SafetensorsSource(tmp_path).shapes)


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "falcon", "llama"])
def test_a_base_model_is_the_model_without_its_prefix(model_type: str, tmp_path: Path) -> None:
    model = make(model_type, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(model.base_model_prefix + ".") for name in SafetensorsSource(tmp_path).shapes)
    assert_holds(converted(SafetensorsSource(tmp_path), model.config), model)


def stored(model: PreTrainedModel, folder: Path, **more: Tensor) -> WeightSource:
    model.save_pretrained(folder)
    tensors = {**load_file(folder / "model.safetensors"), **more}
    save_file(tensors, folder / "model.safetensors")
    return SafetensorsSource(folder)


def test_what_transformers_ignores_is_ignored(tmp_path: Path) -> None:
    model = make("gpt2")
    mask = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool) for layer in range(2)}
    assert_holds(converted(stored(model, tmp_path, **mask), model.config), model)


def test_what_nobody_knows_keeps_its_name(tmp_path: Path) -> None:
    model = make("gpt2")
    source = converted(stored(model, tmp_path, unknown=torch.ones(2)), model.config)
    assert source.shapes.pop("unknown") == (2,)


def test_tied_weights_may_be_in_the_file_twice_or_under_the_other_name(tmp_path: Path) -> None:
    model = make("gpt2")
    weight = model.lm_head.weight.detach()
    assert_holds(converted(stored(model, tmp_path, **{"lm_head.weight": weight.clone()}), model.config), model)
    with pytest.raises(CheckpointError, match=r"^tensors lm_head\.weight and transformer\.wte\.weight differ"):
        converted(stored(model, tmp_path, **{"lm_head.weight": weight + 1}), model.config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.wte.weight"]
    save_file({**tensors, "lm_head.weight": weight.clone()}, tmp_path / "model.safetensors")
    assert_holds(converted(SafetensorsSource(tmp_path), model.config), model)


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    model = make("mixtral")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    tensors[name.format(12)] = tensors.pop(name.format(5))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        converted(SafetensorsSource(tmp_path), model.config)
    assert str(error.value) == (
        "tensors model.layers.1.block_sparse_moe.experts.0.w2.weight and 11 more: MergeModulelist to "
        "model.layers.1.mlp.experts.down_proj is not possible: they are numbered 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12"
    )


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    model = make("gpt2")
    source = stored(model, tmp_path, **{"wte.weight": torch.ones(37, 24)})
    with pytest.raises(CheckpointError, match=r"^tensors transformer.wte.weight and wte.weight are both transformer"):
        converted(source, model.config)


class Unknown(ConversionOps):
    def convert(self, *args: Any, **kwargs: Any) -> Any: ...


def test_an_operation_that_is_not_known_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gpt2")
    transforms = [WeightConverter("transformer.wte.weight", "transformer.wte.weight", operations=[Unknown()])]
    source = stored(model, tmp_path)
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: transforms)
    with pytest.raises(CheckpointError) as error:
        converted(source, model.config)
    assert str(error.value) == (
        "tensors transformer.wte.weight: the conversion Unknown to transformer.wte.weight is not supported"
    )


@pytest.mark.skipif(not hasattr(core_model_loading, "Split"), reason="this transformers has not all of them")
def test_operations_against_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the families above do not use, alone and in chains: what transformers makes of the same tensors."""
    from transformers.core_model_loading import Split

    model = make("llama")
    attention, mlp = "self_attn.{}_proj.weight", "mlp.{}_proj.weight"
    transforms = [
        WeightConverter("attn.q.weight", attention.format("q"), operations=[PermuteForRope()]),
        WeightConverter("attn.kv.weight", [attention.format("k"), attention.format("v")], operations=[Split(dim=0)]),
        WeightConverter(["o.a", "o.b"], attention.format("o"), operations=[Concatenate(dim=1)]),
        WeightConverter(
            "mlp.both", [mlp.format("gate"), mlp.format("up")], operations=[Interleave(dim=0), Chunk(dim=0)]
        ),
        WeightConverter("mlp.d", mlp.format("down"), operations=[Transpose(0, 1, check_dims=True)]),
        WeightRenaming("tokens", "model.embed_tokens"),
    ]
    tensors = {
        "tokens.weight": torch.randn(37, 24),
        "model.norm.weight": torch.randn(24),
        "lm_head.weight": torch.randn(37, 24),
    }
    for layer in range(2):
        own = {
            "attn.q.weight": (24, 24), "attn.kv.weight": (24, 24), "o.a": (24, 9), "o.b": (24, 15),
            "mlp.both": (40, 24), "mlp.d": (20, 24),
            "input_layernorm.weight": (24,), "post_attention_layernorm.weight": (24,),
        }  # fmt: skip
        tensors |= {f"model.layers.{layer}.{name}": torch.randn(shape) for name, shape in own.items()}
    for module in (conversion_mapping, modeling_utils):
        monkeypatch.setattr(module, "get_model_conversion_mapping", lambda *_, **__: transforms)
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = type(model).from_pretrained(tmp_path)
    assert torch.equal(theirs.model.embed_tokens.weight, tensors["tokens.weight"])
    assert_holds(converted(SafetensorsSource(tmp_path), model.config), theirs)


@pytest.mark.parametrize("seed", range(20))
def test_virtual_tensors_are_what_torch_makes(seed: int, tmp_path: Path) -> None:
    """Any chain of operations, read in any slice into memory of any order."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    shape = tuple(generator.randint(2, 5) for _ in range(2))
    parts = {f"t{i}": torch.randn(shape) for i in range(4)}
    save_file(parts, tmp_path / "model.safetensors")
    ours = [Virtual.stored(name, shape) for name in parts]
    theirs = list(parts.values())
    for _ in range(6):
        dim = generator.randrange(theirs[0].ndim)
        size = theirs[0].shape[dim]
        kind = generator.choice(["stack", "concatenate", "narrow", "take", "transpose"])
        if kind == "stack" and theirs[0].ndim < 4:
            ours, theirs = [stack(ours, dim)] * 2, [torch.stack(theirs, dim)] * 2
        elif kind == "concatenate":
            ours, theirs = [concatenate(ours, dim)], [torch.cat(theirs, dim)]
        elif kind == "narrow":
            start = generator.randrange(size)
            stop = generator.randint(start + 1, size)
            ours = [each.narrow(dim, start, stop) for each in ours]
            theirs = [each.narrow(dim, start, stop - start) for each in theirs]
        elif kind == "take":
            order = generator.sample(range(size), size)
            ours, theirs = (
                [t.take(dim, order) for t in ours],
                [t.index_select(dim, torch.tensor(order)) for t in theirs],
            )
        else:
            other = generator.randrange(theirs[0].ndim)
            ours, theirs = [t.transpose(dim, other) for t in ours], [t.transpose(dim, other) for t in theirs]
    source = VirtualSource(SafetensorsSource(tmp_path), {"w": ours[0]})
    assert source.shapes == {"w": tuple(theirs[0].shape)}
    for _ in range(5):
        ranges = random_ranges(source.shapes["w"], generator)
        before = source.bytes_read
        assert torch.equal(read(source, "w", ranges), theirs[0][tuple(slice(*r) for r in ranges)])
        assert source.bytes_read - before == 4 * prod(stop - start for start, stop in ranges)


def test_what_fits_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is transformers' model built for it."""
    make_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(checkpoint, "converted", None)
    open_checkpoint(tmp_path)


def test_what_does_not_fit_is_converted(tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    assert_holds(open_checkpoint(tmp_path).source, model)
