"""Float32 greedy output of the demo model is transformers' own, token for token, on every mesh and however it is cut.

The reference is transformers' `generate`, one prompt at a time. Where it differs, and only there, its two best logits
may be too close to call: such a token passes if it is the runner-up by at most 1e-3, and its prompt is not looked at
any further. A run with more than two of them fails.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from meshlm import InferenceConfig, InferenceEngine, RequestOutput, SamplingParams
from meshlm.config.cache import cache_folder

NUM_TOKENS = 48
TIE = 1e-3  # logits
MAX_TIES = 2

MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp_size": 2},
    "tp3": {"tp_size": 3},
    "tp4": {"tp_size": 4},
    "pp2": {"pp_size": 2},
    "pp3": {"pp_size": 3},
    "dp2": {"dp_size": 2},
    "tp2 pp2": {"tp_size": 2, "pp_size": 2},
    "dp2 tp2": {"dp_size": 2, "tp_size": 2},
    "dp2 pp2": {"dp_size": 2, "pp_size": 2},
}
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 1024,
    "block_size": 16,
    "num_kv_blocks": 256,  # 190 MB a replica
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
FEW = (0, 3, 4, 9, 12, 15, 20, 23)  # prompts, where a test is of something that every mesh has shown already


# ---- prompts -----------------------------------------------------------------------------------------------------

PROSE = """Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and
nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the world.
It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about
the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before
coffin warehouses, and bringing up the rear of every funeral I meet; then, I account it high time to get to sea."""

PYTHON = '''def quicksort(values: list[int]) -> list[int]:
    """Sorts without changing its argument."""
    if len(values) < 2:
        return values
    pivot, *rest = values
    smaller = [value for value in rest if value < pivot]
    larger = [value for value in rest if value >= pivot]
    return quicksort(smaller) + [pivot] + quicksort(larger)


def binary_search(values: list[int], wanted: int) -> int | None:
'''

C = "#include <stdio.h>\n\nint main(int argc, char **argv) {\n    for (int i = 1; i < argc; i++) {\n        printf("

CHATS = (
    "What is the capital of France? Answer in one word.",
    "Say hello.",
    "Is 7 a prime number? Answer yes or no.",
    "Explain why the sky is blue to a child of six.",
    "Write a haiku about the sea, the wind and an old wooden boat that nobody has used for many years.",
)


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """24 prompts of 1 to 600 tokens: a licence and prose, code, chats, random ids; several share a beginning."""
    licence = tokenizer.encode((Path(__file__).parents[2] / "LICENSE").read_text())
    prose, python = tokenizer.encode(PROSE), tokenizer.encode(PYTHON)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in CHATS
    ]
    generator = torch.Generator().manual_seed(0)
    random = [torch.randint(len(tokenizer), (n,), generator=generator).tolist() for n in (2, 5, 47, 101)]
    prompts = [
        *(licence[:n] for n in (600, 33, 32, 16)),
        *(prose[:n] for n in (1, 15, 17, 31, 64, len(prose))),
        licence[700:750],
        python,
        python[:40],
        tokenizer.encode(C),
        tokenizer.encode("Once upon a time"),
        *(tokenizer.encode(chat, add_special_tokens=False) for chat in chats),
        *random,
    ]
    lengths = {len(prompt) for prompt in prompts}
    assert len(prompts) == 24 and {1, 15, 16, 17, 31, 32, 33, 600} <= lengths and max(lengths) == 600
    return prompts


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    return make_prompts(transformers.AutoTokenizer.from_pretrained(demo_model))


# ---- the reference -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What transformers generates; each list is [prompt][position]."""

    prompts: list[list[int]]
    token_ids: list[list[int]]
    runners_up: list[list[int]]  # the second best token
    gaps: list[list[float]]  # how much better the best logit is than the second best

    def until_eos(self, index: int, eos: int) -> list[int]:
        """Greedy output with the end token heeded: the same, cut short."""
        token_ids = self.token_ids[index]
        return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids

    def check(
        self, outputs: Sequence[Sequence[int]], indices: Sequence[int] | None = None, num_tokens: int = NUM_TOKENS
    ) -> None:
        """Asserts that outputs are the reference's first tokens for the prompts at `indices`, ties apart."""
        indices = range(len(self.prompts)) if indices is None else indices
        ties = []
        for index, output in zip(indices, outputs, strict=True):
            expected = self.token_ids[index][:num_tokens]
            assert len(output) == len(expected), f"prompt {index}: {len(output)} tokens instead of {len(expected)}"
            differing = [p for p, (got, wanted) in enumerate(zip(output, expected, strict=True)) if got != wanted]
            if not differing:
                continue
            first = differing[0]
            what = (
                f"prompt {index} ({len(self.prompts[index])} tokens), output token {first}: {output[first]} instead of "
                f"{expected[first]}; the runner-up is {self.runners_up[index][first]}, {self.gaps[index][first]:g} less"
            )
            assert output[first] == self.runners_up[index][first] and self.gaps[index][first] <= TIE, what
            ties.append(what)
        assert len(ties) <= MAX_TIES, "\n".join(ties)


def make_reference(model: Path, prompts: list[list[int]], num_tokens: int) -> Reference:
    """By transformers' `generate`, one prompt at a time; kept beside the demo model, as it takes a minute."""
    made_with = [torch.__version__, transformers.__version__, (model / "manifest.json").read_text()]
    key = hashlib.sha256(json.dumps([made_with, prompts, num_tokens]).encode()).hexdigest()[:24]
    file = cache_folder() / "tests" / f"exactness-{key}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        token_ids, runners_up, gaps = [], [], []
        module = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        module.generation_config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=num_tokens, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )  # no end token
        for prompt in prompts:
            made = module.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
            best = torch.cat(made.logits).topk(2)  # [num_tokens, 2]
            token_ids.append(made.sequences[0, len(prompt) :].tolist())
            assert token_ids[-1] == best.indices[:, 0].tolist()
            runners_up.append(best.indices[:, 1].tolist())
            gaps.append((best.values[:, 0] - best.values[:, 1]).tolist())
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([token_ids, runners_up, gaps]))
        temporary.replace(file)
    return Reference(prompts, *json.loads(file.read_text()))


@pytest.fixture(scope="module")
def reference(demo_model: Path, prompts: list[list[int]]) -> Reference:
    return make_reference(demo_model, prompts, NUM_TOKENS)


# ---- engines -----------------------------------------------------------------------------------------------------


@contextmanager
def running(model: Path, **fields: Any) -> Iterator[InferenceEngine]:
    """An engine; proves at the end that it holds nothing and has lost nothing."""
    with InferenceEngine(model, InferenceConfig(**{**COMMON, **fields})) as engine:
        yield engine
        assert_at_rest(engine)


def assert_at_rest(engine: InferenceEngine) -> None:
    engine.check()
    assert not engine.has_unfinished()
    for replica in engine.stats().replicas:
        assert (replica.num_waiting, replica.num_running) == (0, 0)
        assert replica.num_free_blocks == replica.num_blocks


def generate(engine: InferenceEngine, prompts: Sequence[list[int]], params: Any = GREEDY) -> list[tuple[int, ...]]:
    return [output.token_ids for output in engine.generate(list(prompts), params, progress=False)]


def step_until_done(engine: InferenceEngine, finished: dict[str, RequestOutput]) -> None:
    while engine.has_unfinished():
        step(engine, finished)


def step(engine: InferenceEngine, finished: dict[str, RequestOutput]) -> None:
    finished.update((output.request_id, output) for output in engine.step() if output.finished)


# ---- quick: one rank ---------------------------------------------------------------------------------------------


def test_a_few_prompts_on_one_rank(demo_model: Path, prompts: list[list[int]]) -> None:
    few = [prompts[index] for index in (1, 3, 4, 12, 15, 20)]
    reference = make_reference(demo_model, few, 16)
    with running(demo_model) as engine:
        reference.check(generate(engine, few, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)))


# ---- every mesh --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(demo_model: Path) -> Iterator[InferenceEngine]:
    """The mesh of one rank."""
    with running(demo_model) as engine:
        yield engine


@pytest.fixture(scope="module", params=MESHES)
def engine(request: pytest.FixtureRequest, demo_model: Path) -> Iterator[InferenceEngine]:
    """One engine for each mesh, shared by the tests that take it."""
    if not MESHES[request.param]:
        yield request.getfixturevalue("local")
        return
    with running(demo_model, **MESHES[request.param]) as engine:
        yield engine


@pytest.mark.slow  # the real model, on up to four ranks
def test_every_mesh(engine: InferenceEngine, reference: Reference) -> None:
    """All prompts without end token, and in the same batch the chats with it."""
    all_prompts, chats = range(24), range(15, 20)
    eos = engine.tokenizer.eos_token_id
    heeded = GREEDY.model_copy(update={"ignore_eos": False})
    outputs = engine.generate(
        [reference.prompts[index] for index in (*all_prompts, *chats)],
        [GREEDY] * len(all_prompts) + [heeded] * len(chats),
        progress=False,
    )
    reference.check([output.token_ids for output in outputs[:24]])
    expected = [reference.until_eos(index, eos) for index in chats]
    assert sum(len(token_ids) < NUM_TOKENS for token_ids in expected) >= 2
    for output, token_ids in zip(outputs[24:], expected, strict=True):
        assert list(output.token_ids) == token_ids
        assert output.finish_reason == ("stop" if token_ids[-1] == eos else "length")
    assert_at_rest(engine)


@pytest.mark.slow
def test_requests_that_arrive_in_the_middle(engine: InferenceEngine, reference: Reference) -> None:
    """Three at once, then one more before every second step; one is aborted on its way."""
    finished: dict[str, RequestOutput] = {}
    indices, num_tokens = [11, 0, 4, 22, 9, 15, 2, 13], 20
    params = GREEDY.model_copy(update={"max_tokens": num_tokens})
    for count, index in enumerate(indices):
        engine.add_request(reference.prompts[index], params, request_id=str(index))
        if count >= 2:
            step(engine, finished)
            step(engine, finished)
        if count == 4:
            engine.add_request(reference.prompts[8], GREEDY, request_id="aborted")
        if count == 6:
            assert engine.abort("aborted")
    assert not all(str(index) in finished for index in indices)
    step_until_done(engine, finished)
    assert finished.pop("aborted").finish_reason == "abort"
    reference.check([finished[str(index)].token_ids for index in indices], indices, num_tokens)
    assert_at_rest(engine)


SAMPLED = (15, 8, 11, 4, 18, 21)


def sampled(engine: InferenceEngine, prompts: list[list[int]], together: bool = True) -> list[tuple[int, ...]]:
    """Each prompt with no filter, with every one, with penalties, and twice from one request; in one batch or alone."""
    common: dict[str, Any] = {"temperature": 0.8, "max_tokens": 12, "ignore_eos": True}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    own: tuple[dict[str, Any], ...] = ({}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}, penalties, {"n": 2})
    params = [{**common, **fields, "seed": seed} for fields in own for seed in range(len(SAMPLED))]
    chosen = [prompts[index] for index in SAMPLED] * len(own)
    pairs = [(chosen, params)] if together else [([p], [values]) for p, values in zip(chosen, params, strict=True)]
    outputs = [output for pair in pairs for output in engine.generate(*pair, progress=False)]
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def sampled_alone(local: InferenceEngine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """One after the other on one rank."""
    return sampled(local, prompts, together=False)


@pytest.mark.slow
def test_same_seed_same_tokens(
    engine: InferenceEngine,
    prompts: list[list[int]],
    sampled_alone: list[tuple[int, ...]],
    reference: Reference,
) -> None:
    outputs = sampled(engine, prompts)
    assert outputs == sampled_alone
    greedy = [tuple(reference.token_ids[index][:12]) for index in SAMPLED]
    assert len({*outputs, *greedy}) > 2 * len(SAMPLED)  # they were sampled
    assert_at_rest(engine)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_more_ranks_than_cores(demo_model: Path, reference: Reference) -> None:
    """Whoever waits leaves its core to who works."""
    with running(demo_model, dp_size=2, pp_size=2, tp_size=2) as engine:
        assert "shared memory" in engine.ranks[0].collectives or not shutil.which("g++")
        outputs = generate(engine, [reference.prompts[index] for index in FEW], SHORT)
        reference.check(outputs, FEW, 16)


@pytest.mark.slow
def test_without_a_compiler(
    demo_model: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same in plain torch, which all ops fall back to."""
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with running(demo_model, tp_size=2, pp_size=2) as engine:
        assert "attention eager" in engine.describe() and "false failed" in engine.describe()
        outputs = generate(engine, [reference.prompts[index] for index in FEW], SHORT)
        reference.check(outputs, FEW, 16)


@pytest.mark.slow
def test_the_generic_policy(demo_model: Path, reference: Reference) -> None:
    """transformers' own layers around our attention; tests/families has them on meshes."""
    with running(demo_model, policy="generic") as engine:
        assert "LlamaForCausalLM (generic policy)" in engine.describe()
        reference.check(generate(engine, reference.prompts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_size": 1, "num_kv_blocks": 2048, "max_num_batched_tokens": 32},
        {"tp_size": 2, "dp_size": 2},
        {"pp_size": 3, "max_num_batched_tokens": 32},
        {"pp_size": 2, "tp_size": 2},
    ],
    ids=str,
)
def test_async_scheduling(fields: dict[str, int], demo_model: Path, reference: Reference) -> None:
    """Steps whose tokens are not known when they are scheduled; some sequences are ended by what was not known."""
    chats = range(15, 20)
    heeded = GREEDY.model_copy(update={"ignore_eos": False})
    with running(demo_model, async_scheduling=True, **fields) as engine:
        scheduler = engine._core.replicas[0].scheduler
        assert scheduler.max_in_flight == scheduler.num_stages + 1
        params = [SHORT] * len(FEW) + [heeded] * len(chats)
        prompts = [reference.prompts[index] for index in (*FEW, *chats)]
        outputs = [list(token_ids) for token_ids in generate(engine, prompts, params)]
        reference.check(outputs[: len(FEW)], FEW, 16)
        assert outputs[len(FEW) :] == [reference.until_eos(index, engine.tokenizer.eos_token_id) for index in chats]


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{}, {"cuda_graphs": False, "async_scheduling": False}, {"tp_size": 2, "pp_size": 2}, {"block_size": 1}],
    ids=str,
)
def test_on_a_gpu(fields: dict[str, Any], demo_model: Path, reference: Reference) -> None:
    """Needs one CUDA device, which several ranks share. Triton's products of float32 are exact, cuBLAS's nearly."""
    with running(demo_model, device="cuda:0", attention_backend="triton", **fields) as engine:
        reference.check(generate(engine, reference.prompts))


class Recorder:
    """A sampler that keeps the logits it is given."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.plan, self.redraw = sampler, sampler.plan, sampler.redraw
        self.logits: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, *args: Any) -> Any:
        self.logits.append(logits.float().cpu().clone())
        return self.sampler(logits, *args)


def first_logits(model: Path, prompts: list[list[int]], **fields: Any) -> torch.Tensor:
    """[num_prompts, vocab_size], after each prompt; in a step each."""
    with running(model, enable_prefix_caching=False, **fields) as engine:
        runner = engine._world.executor.worker.runner
        runner.drawing.sampler = recorder = Recorder(runner.drawing.sampler)
        for prompt in prompts:
            engine.generate([prompt], {"max_tokens": 1, "temperature": 0}, progress=False)
        return torch.cat(recorder.logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["cpu", pytest.param("triton", marks=pytest.mark.cuda), pytest.param("flash", marks=pytest.mark.cuda)]
)
def test_bfloat16_logits(backend: str, demo_model: Path, prompts: list[list[int]]) -> None:
    """As near to float32 as eager's are: bfloat16 alone costs that much, and a mistake in a mask far more.

    What it costs one prompt is chance, 0.04 to 0.6 by what is rounded where: many are asked.
    """
    many = [prompt[: -(-len(prompt) * part // 4)] for part in (4, 3, 2) for prompt in prompts]
    device = "cpu" if backend == "cpu" else "cuda:0"
    own = {"attention_backend": backend, **({"block_size": None} if backend == "flash" else {})}
    try:
        ours = first_logits(demo_model, many, device=device, dtype="bfloat16", **own)
    except ValueError as reason:
        pytest.skip(str(reason))
    exact = first_logits(demo_model, many, device=device, attention_backend="eager")
    eager = first_logits(demo_model, many, device=device, dtype="bfloat16", attention_backend="eager")
    assert (eager - exact).abs().max() < 2
    assert (ours - exact).abs().mean() < 1.25 * (eager - exact).abs().mean()
    assert (ours - exact).abs().max() < 1.5 * (eager - exact).abs().max()


# ---- blocks, chunks, preemption, prefixes ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "backend"), [(1, "auto"), (7, "auto"), (7, "eager")])
def test_block_size(block_size: int, backend: str, demo_model: Path, reference: Reference) -> None:
    """16 on the meshes above."""
    fields = {"block_size": block_size, "num_kv_blocks": 3840 // block_size, "attention_backend": backend}
    with running(demo_model, **fields) as engine:
        reference.check(generate(engine, reference.prompts, SHORT), num_tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"block_size": 1, "num_kv_blocks": 2048}, {"tp_size": 2, "pp_size": 2, "block_size": 7}], ids=str
)
def test_long_prompts_in_chunks(fields: dict[str, int], demo_model: Path, reference: Reference) -> None:
    indices = [0, 2, 9, 11, 15, 23]
    with running(demo_model, max_num_batched_tokens=32, **fields) as engine:
        reference.check(generate(engine, [reference.prompts[index] for index in indices], SHORT), indices, 16)
        num_tokens = sum(len(reference.prompts[index]) for index in indices)
        assert engine.stats().replicas[0].num_steps > num_tokens // 32


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_size": 1, "num_kv_blocks": 224},
        {"max_num_batched_tokens": 32, "enable_prefix_caching": False},
        {"pp_size": 2},
    ],
    ids=str,
)
def test_preemption(fields: dict[str, Any], demo_model: Path, reference: Reference) -> None:
    """The cache has room for four or five of these eleven requests once they are done."""
    indices = [1, 3, 5, 6, 7, 12, 13, 14, 15, 16, 20]
    # 14 blocks of 16: 224 tokens; each of these requests ends with 50 to 95.
    with running(demo_model, **{"max_model_len": 128, "num_kv_blocks": 14, **fields}) as engine:
        reference.check(generate(engine, [reference.prompts[index] for index in indices]), indices)
        assert engine.stats().num_preemptions > 0


@pytest.mark.slow
def test_prefix_hits(demo_model: Path, reference: Reference) -> None:
    with running(demo_model) as engine:
        long, short, exact = 0, 1, 2  # 600, 33 and 32 tokens of one text
        first = engine.generate([reference.prompts[long]], GREEDY, progress=False)
        assert first[0].num_cached_tokens == 0 == engine.stats().num_cached_tokens
        outputs = engine.generate([reference.prompts[i] for i in (short, exact, long)], GREEDY, progress=False)
        # Of a prompt that is cached to its end, the last block is computed again: it takes a token to go on.
        assert [output.num_cached_tokens for output in outputs] == [32, 16, 592]
        assert engine.stats().num_cached_tokens == 32 + 16 + 592
        reference.check([o.token_ids for o in (*first, *outputs)], [long, short, exact, long])

        # The next turn of a conversation finds the answer to the last one cached too.
        answer = reference.token_ids[long]
        (output,) = engine.generate([reference.prompts[long] + answer[:40]], GREEDY, progress=False)
        assert output.num_cached_tokens == 624
        assert list(output.token_ids[: NUM_TOKENS - 40]) == answer[40:]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"attention_backend": "eager", "block_size": 7}, {"pp_size": 2}], ids=str)
def test_prompts_that_come_together_share_a_prefix(
    fields: dict[str, Any], demo_model: Path, reference: Reference
) -> None:
    """The first computes it; the others take it from the same step, or from one in flight."""
    with running(demo_model, **{"num_kv_blocks": 400, **fields}) as engine:
        outputs = engine.generate([reference.prompts[i] for i in (0, 1, 2)], GREEDY, progress=False)
        size = engine.block_size
        assert [output.num_cached_tokens for output in outputs] == [0, 32 // size * size, 31 // size * size]
        reference.check([output.token_ids for output in outputs], [0, 1, 2])


@pytest.mark.slow
def test_the_prefix_cache_can_be_turned_off(demo_model: Path, reference: Reference) -> None:
    with running(demo_model, enable_prefix_caching=False) as engine:
        outputs = engine.generate([reference.prompts[2]] * 2, GREEDY, progress=False)
        outputs += engine.generate([reference.prompts[2]], GREEDY, progress=False)
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
        reference.check([output.token_ids for output in outputs], [2, 2, 2])


# ---- torchrun ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun(tmp_path: Path, demo_model: Path, reference: Reference, torchrun: Any) -> None:
    """Every rank returns the same, in every method of the engine, and raises the same for a bad prompt."""
    meshes = ("tp2 pp2", "dp2 tp2")  # one after the other, on the same ranks
    task = {
        "model": str(demo_model),
        "configs": [{**COMMON, **MESHES[mesh]} for mesh in meshes],
        "prompts": [reference.prompts[index] for index in FEW],
        "params": SHORT.model_dump(include={"temperature", "max_tokens", "ignore_eos"}),
        "vocab_size": 49152,
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    with torchrun(4, Path(__file__).with_name("torchrun_script.py"), str(tmp_path)) as agent:
        out, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, out + err
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    for report in reports:
        assert report == reports[0]
    *by_mesh, more = reports[0]
    assert len(by_mesh) == len(meshes)
    for report in by_mesh:
        reference.check(report["generated"], FEW, 16)
        reference.check(report["streamed"], FEW[2:4], 16)
        reference.check(report["stepped"], FEW[4:7], 16)
        assert "token id 49152 is out of range" in report["error"]
        assert len(report["scored"]) == 4 and all(logprob <= 0 for logprob in report["scored"])
        assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-4) for vector in report["embedded"])
        assert report["score_error"] == "texts[1]: text is empty: it must have at least one token"
        assert all(replica["num_free_blocks"] == replica["num_blocks"] for replica in report["replicas"])
    reference.check(more["shaped"], FEW[1:3], 16)
    reference.check(more["speculated"], FEW[1:4], 16)
    reference.check(more["drafted"], FEW[4:6], 16)
    assert "draft_model" in more["speculative"] and "'eagle'" in more["refused"] and more["stopped"] is None
    assert more["num_accepted"] >= 12  # the demo model drafts for itself: always right
