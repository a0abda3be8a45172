"""A stage's forward against transformers: tiny random Llamas, float32, greedy, token for token.

In a world of one rank; `tests/engine/test_exactness.py` does it on meshes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, InferenceShardformer, ProcessGroupMesh, SamplingParams
from meshlm.policies import find_policy
from meshlm.shardformer import attention
from meshlm.shardformer.checkpoint import read_rotary
from tiny import llama_config, make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_NEW = 24
CONFIG = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=64, block_size=4)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 70,
    "vocab_size": 211,
    "max_position_embeddings": 128,
}
PROMPTS = [[17, 3, 99, 41, 5], [8], [(37 * i + 11) % 211 for i in range(40)], [200, 17, 3, 99, 41, 5, 60]]


make_model = partial(make_llama, **SIZES)


def reference(model: LlamaForCausalLM, prompt: list[int]) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def assert_equal_to_transformers(model: LlamaForCausalLM, given: Any = None, config: InferenceConfig = CONFIG) -> None:
    expected = [reference(model, prompt) for prompt in PROMPTS]
    assert min(len(set(tokens)) for tokens in expected) >= 6, "outputs too plain to prove anything"
    assert reference(model, [(PROMPTS[0][0] + 1) % 211, *PROMPTS[0][1:]]) != expected[0], "the first token is heard"
    with InferenceEngine(model if given is None else given, config) as engine:
        outputs = engine.generate(PROMPTS, GREEDY, progress=False)
        engine.check()
    assert [list(output.token_ids) for output in outputs] == expected


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 6},
    "mqa": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True},
    "larger heads": {"head_dim": 20},
    "smaller heads": {"head_dim": 2, "num_key_value_heads": 2},
    "one layer": {"num_hidden_layers": 1},
    "another epsilon": {"rms_norm_eps": 0.3},
}


@pytest.mark.parametrize("values", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(values: dict[str, Any]) -> None:
    assert_equal_to_transformers(make_model(**values))


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 12345.6},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    },
    "yarn, all set": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 500000.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.3, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 96,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_rope_kinds(kind: str) -> None:
    assert_equal_to_transformers(make_model(rope_parameters=dict(ROPES[kind])))


@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["default", "yarn, all set"])
def test_the_rotary_table_is_the_whole_one_bit_for_bit(
    kind: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_TABLE_ROWS", rows)
    length = 5000 if rows == 4096 else 128
    config = llama_config(**SIZES, head_dim=20, rope_parameters=dict(ROPES[kind]))
    spec = find_policy(["LlamaForCausalLM"]).spec(config, read_rotary)
    (rotary,) = spec.rotaries
    table = attention.RotaryTable(rotary, length, dtype, torch.device("cpu"))
    assert table.cos.shape == table.sin.shape == (length, 10)
    angles = torch.arange(length).float()[:, None] * torch.tensor(rotary.inv_freq)
    cos, sin = ((f() * rotary.scaling).to(dtype) for f in (angles.cos, angles.sin))
    assert torch.equal(table.cos, cos) and torch.equal(table.sin, sin)


@pytest.mark.parametrize("kind", [kind for kind in ROPES if kind not in ("default", "longrope")])
def test_rope_kinds_differ(kind: str) -> None:
    """Guards the test above: a kind that was read as "default" would be seen."""
    plain = {"rope_type": "default", "rope_theta": ROPES[kind]["rope_theta"]}
    model, other = make_model(rope_parameters=dict(ROPES[kind])), make_model(rope_parameters=plain)
    same = [reference(model, prompt) == reference(other, prompt) for prompt in PROMPTS]
    assert all(same) if kind == "dynamic" else not all(same)  # dynamic is plain within the original length


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 128), ("longrope", 96)])
def test_lengths_at_which_frequencies_change_are_refused(kind: str, limit: int) -> None:
    model = make_model(rope_parameters=dict(ROPES[kind]))
    with InferenceEngine(model, CONFIG) as engine:
        assert engine.max_model_len == limit
    with pytest.raises(ValueError) as error:
        InferenceEngine(model, CONFIG.replace(max_model_len=limit + 1))
    assert str(error.value) == f"max_model_len={limit + 1} is more than the model's {limit} positions"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_directories(tmp_path: Path, max_shard_size: str, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied, attention_bias=True)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "30KB")
    assert_equal_to_transformers(model, tmp_path)


def test_every_weight_comes_from_the_checkpoint() -> None:
    """What memory held before does not matter: no parameter stays as it was allocated."""
    model = make_model(attention_bias=True, mlp_bias=True)
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = True  # NaN wherever torch.empty is not overwritten
        assert_equal_to_transformers(model)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_transformers(dtype: str) -> None:
    """Both round, in other places: compare the first token's logits, not the tokens that follow from them."""
    model = make_model(initializer_range=0.1).to(getattr(torch, dtype))
    with InferenceEngine(model, CONFIG.replace(dtype="auto")) as engine:
        assert engine.ranks[0].dtype == dtype
        stage = engine._world.executor.worker.stage
        seen: list[torch.Tensor] = []
        stage.head.linear.register_forward_hook(lambda *args: seen.append(args[-1]))
        engine.generate(PROMPTS[2], SamplingParams(temperature=0, max_tokens=1), progress=False)
    with torch.inference_mode():
        exact = model.float()(torch.tensor([PROMPTS[2]])).logits[0, -1]
    assert seen[0].dtype == getattr(torch, dtype)
    torch.testing.assert_close(seen[0][0].float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"block_size": 1, "num_kv_blocks": 128},
        {"max_num_batched_tokens": 7},
        {"max_num_seqs": 1},
        {"num_kv_blocks": 17},
    ],
    ids=str,
)
def test_scheduling_changes_no_token(values: dict[str, Any]) -> None:
    assert_equal_to_transformers(make_model(), config=CONFIG.replace(**values))


@pytest.mark.parametrize(
    ("device", "num_devices", "local_rank", "expected"),
    [
        ("auto", 0, None, "cpu"),
        ("auto", 1, None, "cuda:0"),
        ("auto", 2, 1, "cuda:1"),
        ("auto", 1, 1, "cpu"),  # two ranks on this host
        ("cpu", 2, 1, "cpu"),
        ("cuda:1", 2, 0, "cuda:1"),
    ],
)
def test_the_device_of_a_shardformer_that_is_given_none(
    device: str, num_devices: int, local_rank: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    if local_rank is not None:
        place = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2, "MASTER_ADDR": "none", "MASTER_PORT": 1}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
    mesh = ProcessGroupMesh(dp=1, pp=1, tp=1)
    assert InferenceShardformer(InferenceConfig(device=device), mesh).device == torch.device(expected)
    own = torch.device("cpu")
    assert InferenceShardformer(InferenceConfig(device=device), mesh, own).device == own


def test_one_request_s_nan_does_not_reach_another() -> None:
    """Blocks that held NaN are handed on, and pad the shorter sequences of a step."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    prompts, poisoned = [[1, 2, 3], [4, 5, 6, 8, 9, 10, 11]], [[7] * 40] * 3
    config = CONFIG.replace(enable_prefix_caching=False, block_size=4, num_kv_blocks=64, max_model_len=128)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with InferenceEngine(model, config) as engine:
        before = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
        engine.generate(poisoned, params, progress=False)
        after = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
        beside = [output.token_ids for output in engine.generate(prompts + poisoned, params, progress=False)][:2]
    assert before == after == beside


def test_the_last_layer_ends_with_the_tokens_that_are_wanted() -> None:
    params = {"temperature": 0, "max_tokens": 1, "ignore_eos": True}
    plain, told = SamplingParams(**params), SamplingParams(**params, prompt_logprobs=0)
    with InferenceEngine(make_model(), CONFIG.replace(max_num_batched_tokens=16)) as engine:
        layers = engine._world.executor.worker.runner.stage.layers  # type: ignore[attr-defined]
        first, last = list[int](), list[int]()
        for layer, rows in ((layers[0], first), (layers[-1], last)):
            layer.mlp.register_forward_hook(lambda _, args, __, rows=rows: rows.append(len(args[0])))
        tokens = [output.token_ids for output in engine.generate([PROMPTS[0], PROMPTS[1]], plain, progress=False)]
        assert (first, last) == ([6], [2])
        engine.generate([PROMPTS[2]], plain, progress=False)  # its first chunks draw nothing: then all go to the end
        assert (first, last) == ([6, 16, 16, 8], [2, 16, 16, 1])
        outputs = engine.generate([PROMPTS[0], PROMPTS[1]], told, progress=False)
        assert first[-1] == last[-1] == 6 and [output.token_ids for output in outputs] == tokens
