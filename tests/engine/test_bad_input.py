"""What a caller can get wrong: one line that says what to change, and the engine answers the next request."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaForCausalLM

from meshlm import CheckpointError, ConfigError, InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine import plan
from meshlm.shardformer import open_checkpoint
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = InferenceConfig(device="cpu", num_kv_blocks=16, block_size=4, max_model_len=40)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def engine(model: LlamaForCausalLM) -> Iterator[InferenceEngine]:
    with InferenceEngine(model, CONFIG) as engine:
        yield engine


@pytest.fixture
def directory(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def message_of(call: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


def refused(engine: InferenceEngine, call: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """The message; and nothing is left of the request."""
    before = engine.stats()
    message = message_of(call, kind)
    assert engine.stats() == before and not engine.has_unfinished()
    output = engine.generate([5, 6, 7], {"max_tokens": 3}, progress=False)[0]
    assert len(output.token_ids) == 3 and output.finish_reason == "length"
    engine.check()
    return message


# ---- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty: it must have at least one token"),
        ([[]], "prompt is empty: it must have at least one token"),
        (
            list(range(40)),
            "prompt has 40 tokens; with max_model_len=40 it may have at most 39, which leaves one to generate; "
            "truncate_prompt_tokens would keep its end",
        ),
        ([1, 101], "prompt: token id 101 is out of range; the vocabulary has 0 to 100"),
        ([-1], "prompt: token id -1 is out of range; the vocabulary has 0 to 100"),
        ([2**70], f"prompt: token id {2**70} is out of range; the vocabulary has 0 to 100"),
        ("text", "prompt: the engine has no tokenizer; give it one (tokenizer=…), or prompts of token ids"),
        (
            [{"role": "user", "content": "hi"}],
            "prompt: the engine has no tokenizer; give it one (tokenizer=…), or prompts of token ids",
        ),
        ([[1, 2], [3, 200]], "prompts[1]: prompt: token id 200 is out of range; the vocabulary has 0 to 100"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts(engine: InferenceEngine, prompt: Any, message: str) -> None:
    if prompt != []:  # no prompts at all are no mistake
        assert refused(engine, lambda: engine.generate(prompt, progress=False)) == message
        assert refused(engine, lambda: list(engine.stream(prompt))) == message
    if prompt == [] or not isinstance(prompt[0], list):
        assert refused(engine, lambda: engine.add_request(prompt)) == message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "prompts: int is not a prompt or a list of prompts"),
        (None, "prompts: NoneType is not a prompt or a list of prompts"),
        (b"a", "prompts: bytes is not a prompt or a list of prompts"),
        ([[1, 2.5]], "prompt: 2.5 is not a token id"),
        ([[1, "a"]], "prompt: 'a' is not a token id"),
        ([None], "prompt: NoneType is not a text, a list of token ids, or a chat's messages"),
    ],
    ids=str,
)
def test_prompts_of_another_type(engine: InferenceEngine, prompt: Any, message: str) -> None:
    assert refused(engine, lambda: engine.generate(prompt, progress=False), TypeError) == message


def test_params_and_config_of_another_type(engine: InferenceEngine) -> None:
    with pytest.raises(TypeError) as error:
        engine.generate([1], "greedy", progress=False)
    assert "str" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"^config: a dict is no InferenceConfig; give InferenceConfig"):
        InferenceEngine("nowhere", {"tp_size": 2})  # type: ignore[arg-type]


PARAMS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "SamplingParams.max_tokens: 0 is not valid: must be at least 1"),
    ({"temperature": -0.5}, "SamplingParams.temperature: -0.5 is not valid: must be in [0, 100]"),
    (
        {"temperature": math.nan},
        "SamplingParams.temperature: nan is not valid: must be a finite number, in [0, 100]",
    ),
    ({"top_p": 0}, "SamplingParams.top_p: 0 is not valid: must be in (0, 1]"),
    ({"top_p": 1.5}, "SamplingParams.top_p: 1.5 is not valid: must be in (0, 1]"),
    ({"top_p": math.nan}, "SamplingParams.top_p: nan is not valid: must be a finite number, in (0, 1]"),
    ({"max_token": 3}, "SamplingParams.max_token: unknown field; the nearest known one is max_tokens"),
    ({"stop": "x"}, "stop=['x']: stop strings need a tokenizer, and the engine has none"),
    ({"stop_token_ids": [101]}, "stop_token_ids: token id 101 is out of range; the vocabulary has 0 to 100"),
    ({"logit_bias": {101: 1}}, "logit_bias: token id 101 is out of range; the vocabulary has 0 to 100"),
    ({"bad_words": ["x"]}, "bad_words=['x']: strings need a tokenizer, and the engine has none; give token ids"),
    ({"forced_token_ids": [1] * 39}, "forced_token_ids has 39 tokens; after a prompt of 2 there is room for 38"),
    (
        {"num_beams": 2, "temperature": 0.5},
        "SamplingParams: num_beams=2 with temperature=0.5: beam search does not sample; give temperature=0, or "
        "num_beams=1",
    ),
    ({"max_total_tokens": 2}, "max_total_tokens=2 leaves nothing to generate after a prompt of 2 tokens"),
]


@pytest.mark.parametrize(("params", "message"), PARAMS, ids=str)
def test_sampling_params(engine: InferenceEngine, params: dict[str, Any], message: str) -> None:
    for call in (
        lambda: engine.generate([1, 2], params, progress=False),
        lambda: list(engine.stream([1, 2], params)),
        lambda: engine.add_request([1, 2], params),
        lambda: engine.generate([1, 2], SamplingParams(**params), progress=False),
    ):
        assert refused(engine, call) == message


def test_generation_configs_that_ask_for_what_is_not_there(engine: InferenceEngine) -> None:
    given = GenerationConfig(guidance_scale=2.0)
    assert refused(engine, lambda: engine.generate([1], given, progress=False)) == (
        "GenerationConfig.guidance_scale=2.0 is not supported"
    )


def test_params_of_another_type_or_number(engine: InferenceEngine) -> None:
    assert refused(engine, lambda: engine.generate([1], 3, progress=False), TypeError) == (
        "sampling params must be SamplingParams, GenerationConfig, a dict or None, not int"
    )
    assert refused(engine, lambda: engine.generate([[1], [2]], [None], progress=False)) == (
        "sampling_params: 1 given for 2 prompts; give one, or one for each"
    )


def test_one_bad_prompt_begins_none(engine: InferenceEngine) -> None:
    before = engine.stats()
    params = [{"max_tokens": 2}, {"max_tokens": 0}]
    message = refused(engine, lambda: engine.generate([[1], [2]], params, progress=False))
    assert message == "prompts[1]: SamplingParams.max_tokens: 0 is not valid: must be at least 1"
    assert engine.stats().num_output_tokens == before.num_output_tokens + 3  # of the request that `refused` makes


def test_a_request_id_in_use(engine: InferenceEngine) -> None:
    engine.add_request([1], {"max_tokens": 2}, request_id="mine")
    assert message_of(lambda: engine.add_request([2], request_id="mine")) == (
        "request_id='mine' is in use by a request that has not ended"
    )
    while engine.has_unfinished():
        assert {output.request_id for output in engine.step()} <= {"mine"}
    assert engine.add_request([2], {"max_tokens": 1}, request_id="mine") == "mine"
    while engine.has_unfinished():
        engine.step()


def test_bad_requests_do_not_disturb_those_that_run(engine: InferenceEngine) -> None:
    alone = engine.generate([3, 1, 4], {"max_tokens": 8}, progress=False)[0].token_ids
    request_id = engine.add_request([3, 1, 4], {"max_tokens": 8})
    outputs = engine.step()
    for _ in range(3):
        message_of(lambda: engine.add_request([500]))
        message_of(lambda: engine.generate([1], {"temperature": -1}, progress=False))
        outputs += engine.step()
    while engine.has_unfinished():
        outputs += engine.step()
    assert outputs[-1].request_id == request_id and outputs[-1].token_ids == alone


# ---- configs and meshes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp_sizes": 2}, "InferenceConfig.tp_sizes: unknown field; the nearest known one is tp_size"),
        ({"tp_size": 0}, "InferenceConfig.tp_size: 0 is not valid: must be at least 1"),
        ({"pp_size": -1}, "InferenceConfig.pp_size: -1 is not valid: must be at least 1"),
        ({"dp_size": 0}, "InferenceConfig.dp_size: 0 is not valid: must be at least 1"),
        ({"max_num_seqs": 0}, "InferenceConfig.max_num_seqs: 0 is not valid: must be at least 1"),
        ({"max_num_batched_tokens": 0}, "InferenceConfig.max_num_batched_tokens: 0 is not valid: must be at least 1"),
        ({"block_size": 0}, "InferenceConfig.block_size: 0 is not valid: must be at least 1"),
        ({"num_kv_blocks": -3}, "InferenceConfig.num_kv_blocks: -3 is not valid: must be at least 1"),
        ({"max_model_len": 0}, "InferenceConfig.max_model_len: 0 is not valid: must be at least 1"),
    ],
    ids=str,
)
def test_fields(values: dict[str, Any], message: str) -> None:
    assert message_of(lambda: InferenceConfig(**values), ConfigError) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pp_size": 4}, "pp_size=4 is more than the model's 3 layers; use pp_size <= 3"),
        ({"tp_size": 10}, "tp_size=10 is more than the model's 9 query heads; use tp_size <= 9"),
        ({"tp_size": 10, "pp_size": 4}, "tp_size=10 is more than the model's 9 query heads; use tp_size <= 9"),
        ({"max_model_len": 65}, "max_model_len=65 is more than the model's 64 positions"),
        (
            {"tp_size": 2, "attention_backend": "telepathy"},
            "InferenceConfig.attention_backend: 'telepathy' is not known; "
            "known: auto, tuned, flash, triton, cpu, eager",
        ),
        (
            {"pp_size": 2, "device": "cuda"},
            "InferenceConfig.device: 'cuda' is not available: torch sees 0 CUDA devices; use 'cpu'",
        ),
        (
            {"device": "cuda:1"},
            "InferenceConfig.device: 'cuda:1' is not available: torch sees 0 CUDA devices; use 'cpu'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_before_anything_starts(
    model: LlamaForCausalLM, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("socket.socket", "subprocess.Popen", "os.fork", "torch.distributed.TCPStore"):
        monkeypatch.setattr(name, started)
    monkeypatch.setattr("meshlm.engine.engine.World", started)
    process = psutil.Process()
    before = process.children(recursive=True), process.num_fds()
    assert message_of(lambda: InferenceEngine(model, CONFIG.replace(**values))) == message
    assert (process.children(recursive=True), process.num_fds()) == before


def test_ranks_that_were_given_different_models(model: LlamaForCausalLM, tmp_path: Path) -> None:
    other = make_llama(seed=1, num_hidden_layers=2, intermediate_size=40, vocab_size=90)
    cpu = torch.device("cpu")
    ours, theirs = (plan.settings(CONFIG, cpu, open_checkpoint(given)) for given in (model, other))
    plan.check_alike([ours, ours])
    assert message_of(lambda: plan.check_alike([ours, theirs, ours, theirs])) == (
        "model.num_layers: ranks 0, 2 have 3, ranks 1, 3 have 2; model.vocab_size: ranks 0, 2 have 101, ranks 1, 3 "
        "have 90; model.embedding.tokens.sizes[0]: ranks 0, 2 have 101, ranks 1, 3 have 90; more that differ: 8; under "
        "torchrun every rank is to be given the same"
    )
    model.save_pretrained(tmp_path)
    broken = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    plan.check_alike([ours, plan.settings(CONFIG, cpu, broken)])  # loading says what is wrong with it


def test_fewer_cuda_devices_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert message_of(lambda: plan.choose_devices(InferenceConfig(device="cuda:2"), 1)) == (
        "InferenceConfig.device: 'cuda:2' is not available: torch sees 2 CUDA devices; use 'cpu' or cuda:0 to cuda:1"
    )
    assert message_of(lambda: plan.choose_devices(InferenceConfig(device="cuda"), 4)) == (
        "InferenceConfig.device: 'cuda' has 2 devices for 4 ranks on this host; use smaller sizes of the mesh, or "
        "device='cuda:0' to share one (over gloo and slowly: for tests)"
    )
    assert plan.choose_devices(InferenceConfig(device="auto"), 4) == [torch.device("cpu")] * 4
    assert plan.choose_devices(InferenceConfig(device="auto"), 2) == [torch.device("cuda", i) for i in range(2)]


@pytest.mark.parametrize(("count", "seen"), [(1, "1 CUDA device"), (3, "3 CUDA devices")])
def test_why_the_cpu_was_chosen(
    count: int, seen: str, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    line = plan.why_cpu(InferenceConfig(device="auto"), 4)
    assert line == (
        f"device='auto' chose the CPU, since it takes CUDA only with a device for every rank: torch sees {seen} for 4 "
        f"ranks on this host"
    )
    assert plan.why_cpu(InferenceConfig(device="cpu"), 4) is plan.why_cpu(InferenceConfig(device="auto"), count) is None
    with InferenceEngine(model, CONFIG) as engine:
        assert line not in engine.describe()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert plan.why_cpu(InferenceConfig(device="auto"), 4) is None
    monkeypatch.setattr("meshlm.engine.engine.why_cpu", lambda *_: line)
    with InferenceEngine(model, CONFIG) as engine:
        assert engine.describe_mesh().splitlines()[-1] == line


def test_a_dtype_that_the_device_does_not_have(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "runs_on", lambda dtype, device: dtype is torch.float32)
    assert message_of(lambda: InferenceEngine(model, CONFIG.replace(dtype="bfloat16")), ConfigError) == (
        "InferenceConfig.dtype: torch.bfloat16 is not supported on cpu; use 'float32'"
    )
    with InferenceEngine(model, CONFIG.replace(dtype="float32")) as engine:
        assert engine.generate([1], {"max_tokens": 1}, progress=False)[0].finished


def test_a_model_that_does_not_fit(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_bytes", lambda device: 2**10)
    message = message_of(lambda: InferenceEngine(model, CONFIG), ConfigError)
    assert message.startswith("the model does not fit: its weights take 0.00 GiB on cpu and 0.00 GiB is free, ")
    assert (
        "use more ranks on other devices (tp_size=1, pp_size=1 now) or a smaller dtype (torch.float32 now)" in message
    )


def test_a_cache_too_small_for_one_request(model: LlamaForCausalLM) -> None:
    assert message_of(lambda: InferenceEngine(model, CONFIG.replace(num_kv_blocks=9)), ConfigError) == (
        "the KV cache is too small for one request: 9 blocks of 4 hold 36 tokens, max_model_len is 40; 0.0 MiB is "
        "missing on rank 0 (dp 0, pp 0, tp 0): raise num_kv_blocks, kv_memory_bytes or kv_memory_fraction, lower "
        "max_model_len, or use more ranks"
    )
    # 36 hidden / 9 heads = 4; 3 layers × 2 × 3 KV heads × 4 × 4 bytes × 4 tokens = 1152 bytes a block
    small = CONFIG.replace(num_kv_blocks=None, kv_memory_bytes=1152 * 9 + 1151)
    assert "9 blocks of 4 hold 36 tokens" in message_of(lambda: InferenceEngine(model, small))
    nothing = small.replace(max_model_len=None, kv_memory_bytes=1151)
    assert "0 blocks of 4 hold 0 tokens" in message_of(lambda: InferenceEngine(model, nothing))


def test_kv_heads_that_do_not_divide_the_query_heads(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = make_llama(num_attention_heads=4, num_key_value_heads=3, hidden_size=32)
    monkeypatch.setattr("meshlm.engine.engine.World", None)
    assert message_of(lambda: InferenceEngine(uneven, CONFIG)) == (
        "num_attention_heads=4 is not a multiple of num_key_value_heads=3: each KV head must serve equally many query "
        "heads"
    )


def test_a_cache_that_the_memory_cannot_hold(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocated(*_: Any) -> None:
        raise AssertionError("the cache was allocated")

    monkeypatch.setattr("meshlm.engine.worker.Worker.allocate", allocated)
    monkeypatch.setattr("meshlm.engine.worker.available_bytes", lambda device: 100_000)  # 86 blocks of 1152 bytes
    assert message_of(lambda: InferenceEngine(model, CONFIG.replace(num_kv_blocks=87)), ConfigError) == (
        "InferenceConfig.num_kv_blocks: 87 does not fit on cpu of rank 0 (dp 0, pp 0, tp 0): 87 blocks take 100224 "
        "bytes, 100000 are free, 224 bytes are missing; use at most 86, or more ranks on other devices"
    )
    small = CONFIG.replace(num_kv_blocks=None, kv_memory_bytes=1152 * 90)
    assert message_of(lambda: InferenceEngine(model, small), ConfigError).startswith(
        "InferenceConfig.kv_memory_bytes: 103680 does not fit on cpu of rank 0 (dp 0, pp 0, tp 0): 90 blocks take "
    )
    for fitting in (CONFIG.replace(num_kv_blocks=86), small.replace(kv_memory_bytes=1152 * 87 - 1)):
        with pytest.raises(AssertionError, match="the cache was allocated"):
            InferenceEngine(model, fitting)


def test_ranks_that_share_a_device_are_counted_together(model: LlamaForCausalLM) -> None:
    with InferenceEngine(model, CONFIG) as engine:
        (info,) = engine.ranks
    config = CONFIG.replace(dp_size=3, num_kv_blocks=20)

    def ranks(*places: tuple[str, str]) -> list[Any]:
        return [
            replace(info, rank=rank, host=host, device=device, available_bytes=1152 * 59)
            for rank, (host, device) in enumerate(places)
        ]

    assert plan.choose_num_blocks(config, ranks(("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")), 40) == 20
    shared = ranks(("a", "cpu"), ("a", "cpu"), ("a", "cpu"))
    assert message_of(lambda: plan.choose_num_blocks(config, shared, 40), ConfigError) == (
        "InferenceConfig.num_kv_blocks: 20 does not fit on cpu of rank 0 (dp 0, pp 0, tp 0) and 2 more that share it: "
        "20 blocks take 69120 bytes, 67968 are free, 1152 bytes are missing; use at most 19, or more ranks on other "
        "devices"
    )
    assert plan.choose_num_blocks(config.replace(num_kv_blocks=19), shared, 40) == 19
    by_bytes = config.replace(num_kv_blocks=None, kv_memory_bytes=1152 * 20)
    assert "use at most 21888, or" in message_of(lambda: plan.choose_num_blocks(by_bytes, shared, 40))
    assert plan.choose_num_blocks(by_bytes.replace(kv_memory_bytes=21888), shared, 40) == 19


def test_a_request_larger_than_the_cache(model: LlamaForCausalLM) -> None:
    with InferenceEngine(model, CONFIG.replace(max_model_len=None, num_kv_blocks=4)) as engine:
        assert engine.max_model_len == 16
        assert refused(engine, lambda: engine.generate([1] * 16, progress=False)) == (
            "prompt has 16 tokens; with max_model_len=16 (the KV cache has 4 blocks of 4) it may have at most 15, "
            "which leaves one to generate; truncate_prompt_tokens would keep its end"
        )
        longest = engine.generate([1] * 10, {"max_tokens": 99}, progress=False)[0]
        assert (len(longest.token_ids), longest.finish_reason) == (6, "length")


# ---- checkpoints; more of them in tests/shardformer/test_weights.py ------------------------------------------------


def test_directories_with_faults(directory: Path) -> None:
    def message() -> str:
        return message_of(lambda: InferenceEngine(directory, CONFIG))

    weights, config = directory / "model.safetensors", directory / "config.json"
    whole = weights.read_bytes(), config.read_text()
    tensors = load_file(weights)

    save_file({name: t for name, t in tensors.items() if name != "model.norm.weight"}, weights, {"format": "pt"})
    assert message() == f"{directory}: missing tensors: model.norm.weight"
    save_file({**tensors, "model.extra.weight": torch.ones(1)}, weights, {"format": "pt"})
    assert message() == f"{directory}: tensors that the model does not have: model.extra.weight"
    weights.write_bytes(whole[0][:-100])
    assert message().startswith(f"{weights}: truncated: tensor ")
    weights.write_bytes(whole[0])

    config.write_text(json.dumps({**json.loads(whole[1]), "architectures": ["LlamaForCausalML"]}))
    assert message().startswith("architecture LlamaForCausalML is not supported; nearest supported: LlamaForCausalLM, ")
    config.unlink()
    assert message() == f"{directory}: holds no config.json"
    with pytest.raises(CheckpointError):
        InferenceEngine(directory, CONFIG)
    config.write_text(whole[1])

    with InferenceEngine(directory, CONFIG) as engine:
        assert engine.generate([1], {"max_tokens": 1}, progress=False)[0].finished
    shutil.rmtree(directory)
    assert message().startswith(f"model: {directory} does not exist; expected a directory with config.json")


def test_what_executes_code_must_be_allowed(model: LlamaForCausalLM, directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    assert message_of(lambda: InferenceEngine(directory, CONFIG)) == (
        f"{directory}: its weights are only in pytorch_model.bin, a pickle, and reading one can execute code from it; "
        f"if you trust it, set InferenceConfig.allow_pickle=True"
    )
    with InferenceEngine(directory, CONFIG.replace(allow_pickle=True)) as engine:
        assert engine.generate([1], {"max_tokens": 1}, progress=False)[0].finished

    config = directory / "config.json"
    own = {"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **own}))
    assert message_of(lambda: InferenceEngine(directory, CONFIG)) == (
        f"architecture OwnForCausalLM is code that {directory} brings (auto_map in config.json); it runs only with "
        f"InferenceConfig.trust_remote_code=True"
    )
    trusting = CONFIG.replace(trust_remote_code=True)
    assert "own.py" in message_of(lambda: InferenceEngine(directory, trusting))  # which is not there
