"""Latent attention against transformers' modules: the layer alone, whole and in parts, and whole models."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.kernels import select_ops
from meshlm.kernels.cpu import CpuOps, Unavailable
from meshlm.policies import DecoderSpec, LatentSpec, find_policy
from meshlm.shardformer.attention import RotaryTable
from meshlm.shardformer.backends import AttentionMetadata, Sequences
from meshlm.shardformer.checkpoint import read_rotary
from meshlm.shardformer.latent_attention import LatentAttention
from meshlm.shardformer.linear import Context, Slices
from meshlm.shardformer.shard import Shards
from meshlm.shardformer.sources import ModuleSource
from meshlm.shardformer.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HEADS = 5
SIZES: dict[str, Any] = {
    "hidden_size": 35,
    "num_attention_heads": HEADS,
    "intermediate_size": 50,
    "vocab_size": 101,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "q_lora_rank": 11,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "moe_intermediate_size": 13,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "V2": ("V2", {}),
    "V2 Lite": ("V2", {"q_lora_rank": None}),
    "V2, yarn": ("V2", {"rope_parameters": YARN, "mlp_bias": True}),
    "V2, groups": ("V2", {"topk_method": "group_limited_greedy"}),
    "V3": ("V3", {}),
    "V3, yarn": ("V3", {"rope_parameters": YARN}),
    "V3, halves": ("V3", {"rope_interleave": False, "q_lora_rank": None}),
    "V3, biases": ("V3", {"attention_bias": True}),
}


def make_model(case: str, **more: Any) -> PreTrainedModel:
    kind, values = CASES[case]
    values = {**SIZES, **values, **more, "experts_implementation": "eager"}  # the usual one wants sizes of 4
    torch.manual_seed(0)
    model: PreTrainedModel = (
        DeepseekV2ForCausalLM(DeepseekV2Config(**values))
        if kind == "V2"
        else DeepseekV3ForCausalLM(DeepseekV3Config(**values))
    ).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            nn.init.normal_(tensor, std=0.4)
        elif "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def spec_of(model: PreTrainedModel) -> DecoderSpec:
    return find_policy([type(model).__name__]).spec(model.config, read_rotary)


def layer_of(model: PreTrainedModel, tp_size: int = 1, rank: int = 0, backend: str = "eager") -> LatentAttention:
    """A rank's part of the first layer's attention; its sum over tp is left to us."""
    spec = spec_of(model)
    tp = SimpleNamespace(rank=rank, size=tp_size)
    slices = Slices(Shards(spec, tp_size), cast(Any, tp), torch.float32)
    context = Context(slices, select_ops(CPU, torch.float32), spec.norm, backend, CPU, None)
    declared = spec.layers[0].attention
    assert isinstance(declared, LatentSpec)
    with torch.device("meta"):
        layer = LatentAttention(declared, spec.layer_prefix(0), context, partial=True)
    load_weights(layer, ModuleSource(model), CPU)
    layer.bind_cache(*layer.backend.spec.caches(12, 4, torch.zeros))
    return layer


# New tokens of two sequences, those before: prompts, a decode beside a chunk, decodes.
STEPS = [([7, 3], [0, 0]), ([1, 5], [7, 3]), ([1, 1], [8, 8])]
TABLES = [[3, 1, 5], [2, 7, 0]]


def run(layer: LatentAttention, model: PreTrainedModel, hidden: list[Tensor]) -> list[Tensor]:
    """The layer's output for each sequence, [tokens, hidden], in steps."""
    (rotary,) = spec_of(model).rotaries
    rotaries = [RotaryTable(rotary, 64, torch.float32, CPU)]
    outputs: list[list[Tensor]] = [[], []]
    for new, before in STEPS:
        spans = list(zip(before, (a + b for a, b in zip(before, new, strict=True)), strict=True))
        sequences = Sequences.of(new, [stop for _, stop in spans], TABLES, 4, CPU)
        slots = [TABLES[i][p // 4] * 4 + p % 4 for i, span in enumerate(spans) for p in range(*span)]
        metadata = AttentionMetadata(
            positions=torch.tensor([p for span in spans for p in range(*span)]),
            slots=torch.tensor(slots),
            plans={layer.backend.plan_key: layer.backend.prepare(sequences)},
        )
        x = torch.cat([hidden[i][slice(*span)] for i, span in enumerate(spans)])
        for of, part in zip(outputs, layer(x, rotaries, metadata).split(new), strict=True):
            of.append(part)
    return [torch.cat(parts) for parts in outputs]


def theirs(model: PreTrainedModel, hidden: list[Tensor]) -> list[Tensor]:
    base = cast(Any, model).model
    outputs = []
    for x in hidden:
        mask = torch.full((len(x), len(x)), float("-inf")).triu(1)[None, None]
        embeddings = base.rotary_emb(x[None], torch.arange(len(x))[None])
        out, _ = base.layers[0].self_attn(x[None], position_embeddings=embeddings, attention_mask=mask)
        outputs.append(out[0])
    return outputs


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_the_layer(case: str, tp_size: int) -> None:
    """In parts: 5 heads on 2 ranks are 3 + 2, on 3 ranks 2 + 2 + 1."""
    model = make_model(case)
    hidden = [torch.randn(9, 35), torch.randn(9, 35)]
    layers = [layer_of(model, tp_size, rank) for rank in range(tp_size)]
    assert sum(layer.num_heads for layer in layers) == HEADS
    for layer in layers:
        assert layer.key_cache.shape == (12, 4, 1, 14 + 6), "the latent is held once, on every rank"
        assert layer.value_cache.data_ptr() == layer.key_cache[..., 6:].data_ptr()
    parts = [run(layer, model, hidden) for layer in layers]
    for ours, expected in zip(map(sum, zip(*parts, strict=True)), theirs(model, hidden), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cpu", "triton"])
@torch.inference_mode()
def test_other_backends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled here: tests/kernels/test_paged_attention.py runs them")
    try:
        CpuOps(torch.float32)
    except Unavailable as reason:
        pytest.skip(str(reason))
    model = make_model("V3", kv_lora_rank=32, qk_rope_head_dim=16)
    hidden = [torch.randn(9, 35), torch.randn(9, 35)]
    for ours, expected in zip(run(layer_of(model, backend=name), model, hidden), theirs(model, hidden), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_cases_differ() -> None:
    """Guards the tests above: what a config asks for makes a difference."""
    hidden = [torch.randn(9, 35)]
    with torch.inference_mode():
        plain, yarn, halves = (
            theirs(make_model(c, q_lora_rank=11), hidden)[0] for c in ("V3", "V3, yarn", "V3, halves")
        )
    assert min((plain - other).abs().max() for other in (yarn, halves)) > 0.05


PROMPTS = [[17, 3, 99, 41, 5], [8], [(37 * i + 11) % 100 for i in range(30)]]  # without 100, which would pad
CONFIG = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=64, block_size=4)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("V2", {}),
        ("V2, yarn", {}),
        ("V2, groups", {}),
        ("V3", {}),
        ("V3, halves", {}),
        pytest.param("V3, yarn", {"tp_size": 2, "expert_parallel": True}, marks=pytest.mark.slow),
    ],
)
def test_models(case: str, sizes: dict[str, int]) -> None:
    model = make_model(case)

    def reference(prompt: list[int]) -> list[int]:
        out = cast(Any, model).generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=100)
        return list(out[0, len(prompt) :].tolist())

    expected = [reference(prompt) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) >= 6
    assert reference([18, *PROMPTS[0][1:]]) != expected[0], "the first token is heard"
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with InferenceEngine(model, CONFIG.replace(**sizes)) as engine:
        outputs = engine.generate(PROMPTS, greedy, progress=False)
        engine.check()
        block = engine.ranks[0].block_bytes
    assert [list(output.token_ids) for output in outputs] == expected
    assert block == 2 * 4 * (14 + 6) * 4, "one latent a token and layer, on every rank"


def test_another_backend_while_running() -> None:
    """It is tried on caches of the latents' shape first."""
    try:
        CpuOps(torch.float32)
    except Unavailable as reason:
        pytest.skip(str(reason))
    model = make_model("V3", kv_lora_rank=32, qk_rope_head_dim=16)
    greedy, found = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), []
    with InferenceEngine(model, CONFIG) as engine:
        for name in ("cpu", "eager", "cpu"):
            engine.set_attention_backend(name)
            assert engine.ranks[0].attention_backends == (name,)
            found.append([output.token_ids for output in engine.generate(PROMPTS, greedy, progress=False)])
        with pytest.raises(ValueError, match="values of 32 elements within the keys beside keys of 48"):
            engine.set_attention_backend("flash")
    assert found[0] == found[1] == found[2]


def test_what_is_not_served() -> None:
    config: PreTrainedConfig = DeepseekV3Config(**{**SIZES, "q_lora_rank": None, "attention_bias": True})
    with pytest.raises(ValueError, match="attention_bias=True and no q_lora_rank is not supported"):
        find_policy(["DeepseekV3ForCausalLM"]).spec(config, read_rotary)


def test_declared_tensors_are_the_models() -> None:
    for case in CASES:
        model = make_model(case)
        spec = spec_of(model)
        assert spec.shapes() == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
