"""Speculative decoding, end to end: whoever guesses, on any mesh, no token changes; and what is refused.

Drafts of a model that is the target are all right, those of a noisy copy now and then, those of another hardly ever.
"""

import signal
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from meshlm import InferenceConfig, InferenceEngine, RequestOutput, SamplingParams
from meshlm.config import ConfigError, SpeculativeConfig
from meshlm.config.speculative import as_speculative_config
from meshlm.engine import plan
from meshlm.engine.block_manager import BlockManager
from meshlm.engine.cuda_graphs import DecodeGraphs
from meshlm.engine.kv_cache import KVCache
from meshlm.engine.scheduler import Scheduler
from meshlm.engine.sequence import Sequence
from meshlm.engine.speculation.speculator import Speculator, create_speculator
from meshlm.engine.step import MAX_DRAFTS, StepOutput
from meshlm.engine.worker import Worker
from meshlm.shardformer import open_checkpoint
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON: dict[str, Any] = {"device": "cpu", "block_size": 4, "max_num_batched_tokens": 24}
MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2},
    "dp2": {"dp_size": 2},
    "tp2 pp2": {"tp_size": 2, "pp_size": 2},
}
DRAFTS = ("right", "noisy", "wrong")


def noisy(model: LlamaForCausalLM, scale: float) -> LlamaForCausalLM:
    """The same with other weights, more or less."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * parameter.abs().mean())
    return copy


def make_tokenizer(size: int, first: str = "w0") -> Any:
    words = [first, *(f"w{i}" for i in range(1, size))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=first))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a draft model for the tiny one in each of `DRAFTS`."""
    folder, target = tmp_path_factory.mktemp("drafts"), make_llama()
    for name, model in zip(DRAFTS, (target, noisy(target, 0.12), make_llama(seed=5, num_hidden_layers=2)), strict=True):
        model.save_pretrained(folder / name)
    return folder


def speculation(name: str, drafts: Path, **values: Any) -> SpeculativeConfig:
    """As many drafts as can be: how many pay is a matter of time, and no two runs are alike."""
    if name in DRAFTS:
        values |= {"method": "draft_model", "model": str(drafts / name), "num_speculative_tokens": 3}
    else:
        values |= {"method": name}
    return SpeculativeConfig(adaptive=False, **values)


# ---- no token changes ------------------------------------------------------------------------------------------------

LONG = {"max_tokens": 24, "ignore_eos": True}
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    ([5, 6, 7], {"temperature": 0, **LONG}),
    ([5, 6, 7, 5, 6, 7, 5, 6], {"temperature": 0, **LONG, "logprobs": 3}),
    (list(range(10, 40)), {"temperature": 1.0, "seed": 3, **LONG}),
    ([9] * 9, {"temperature": 0.8, "seed": 3, "top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1, **LONG}),
    ([9] * 9, {"temperature": 0.8, "seed": 4, "top_k": 7, "min_p": 0.01, **LONG}),
    ([1], {"temperature": 0.7, "seed": 5, "presence_penalty": 1.0, "repetition_penalty": 1.2, **LONG}),
    ([5, 6, 7, 5, 6, 7, 5], {"temperature": 0, "no_repeat_ngram_size": 2, "logit_bias": {3: 1.5}, **LONG}),
    ([5, 6, 7, 5, 6, 7, 5], {"temperature": 0.7, "seed": 6, "n": 2, **LONG}),
    ([8, 8], {"temperature": 0, "forced_token_ids": [4, 4, 4, 9], **LONG}),
    ([5, 6, 7], {"temperature": 0, "stop": ["w72 w3", "w9"], "min_tokens": 4, **LONG}),
    ([3], {"temperature": 0.9, "seed": 7, "max_tokens": 2}),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(m, marks=[] if m in ("1", "pp2") else pytest.mark.slow) for m in MESHES],
)
def engine(request: pytest.FixtureRequest) -> Iterator[InferenceEngine]:
    """With so few blocks that sequences are preempted, and so small steps that prompts come in parts."""
    config = InferenceConfig(**COMMON, num_kv_blocks=40, **MESHES[request.param])
    with InferenceEngine(make_llama(), config, make_tokenizer(101)) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: InferenceEngine) -> list[RequestOutput]:
    return generate(engine)


def generate(engine: InferenceEngine) -> list[RequestOutput]:
    prompts, params = zip(*REQUESTS, strict=True)
    outputs = engine.generate(list(prompts), list(params), progress=False)
    engine.check()
    return outputs


def same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """Texts, tokens and how they end are equal; log-probabilities up to rounding."""
    for output, other in zip(outputs, expected, strict=True):
        for ours, theirs in zip(output.outputs, other.outputs, strict=True):
            assert ours.token_ids == theirs.token_ids
            assert (ours.text, ours.finish_reason, ours.stop_reason) == (
                theirs.text,
                theirs.finish_reason,
                theirs.stop_reason,
            )
            for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert (a.rank, a.top_ids) == (b.rank, b.top_ids)
                np.testing.assert_allclose([a.logprob, *a.top_logprobs], [b.logprob, *b.top_logprobs], atol=1e-5)


@pytest.mark.parametrize("name", ["ngram", "suffix", *DRAFTS])
def test_no_token_changes(name: str, engine: InferenceEngine, expected: list[RequestOutput], drafts: Path) -> None:
    engine.enable_spec_decoding(speculation(name, drafts))
    before = engine.stats()
    outputs = generate(engine)
    stats = engine.stats()
    same(outputs, expected)
    drafted, accepted = stats.num_drafted - before.num_drafted, stats.num_accepted - before.num_accepted
    assert (drafted, accepted) == (sum(o.num_drafted for o in outputs), sum(o.num_accepted for o in outputs))
    num_steps = sum(r.num_steps - b.num_steps for r, b in zip(stats.replicas, before.replicas, strict=True))
    num_draft_steps = sum(r.num_draft_steps for r in stats.replicas) - sum(r.num_draft_steps for r in before.replicas)
    assert (num_draft_steps > 0) == (name in DRAFTS) and num_steps > 0
    if name == "right":  # coupled: but for what comes after a stop, all is accepted, with penalties and filters too
        assert drafted > 100 and accepted >= 0.97 * drafted
    elif name == "noisy":
        assert 0.1 * drafted < accepted < 0.9 * drafted
    elif name == "wrong":
        assert accepted < 0.1 * drafted
    else:
        assert accepted > 0
    assert stats.num_preemptions > before.num_preemptions or len(stats.replicas) > 1


def test_on_and_off_in_the_middle(engine: InferenceEngine, expected: list[RequestOutput], drafts: Path) -> None:
    names = ["ngram", "right", None, "suffix", "noisy", "right", None]
    ids = [engine.add_request(prompt, params) for prompt, params in REQUESTS]
    finished: dict[str, RequestOutput] = {}
    number = 0
    while engine.has_unfinished():
        if number % 3 == 0:
            name = names[number // 3 % len(names)]
            if name is None:
                engine.disable_spec_decoding()
            else:
                engine.enable_spec_decoding(speculation(name, drafts))
            assert (engine.speculative is None) == (name is None)
            assert all((rank.draft is not None) == (name in DRAFTS) for rank in engine.ranks)
            who = f"draft_model {drafts / name} (" if name in DRAFTS else f"{name}, always 5"
            assert (f"speculative decoding: {who}" in engine.describe()) == (name is not None)
            engine.check()
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        number += 1
    assert number > 20
    same([finished[request_id] for request_id in ids], expected)


def test_aborted_while_drafted(engine: InferenceEngine, expected: list[RequestOutput], drafts: Path) -> None:
    engine.enable_spec_decoding(speculation("right", drafts))
    for steps in range(1, 12, 2):
        ids = [engine.add_request(prompt, params) for prompt, params in REQUESTS[:4]]
        for _ in range(steps):
            engine.step()
        engine.abort(ids[1])
        finished: dict[str, RequestOutput] = {}
        while engine.has_unfinished():
            finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check()
        same([finished[ids[i]] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])
        assert all(replica.num_free_blocks == replica.num_blocks for replica in engine.stats().replicas)


def test_from_the_start_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft model is loaded with the target, its cache is reckoned with, and its steps run from recordings."""
    model, params = make_llama(head_dim=16), {"temperature": 0, **LONG}
    model.save_pretrained(tmp_path)
    config = InferenceConfig(**COMMON, kv_memory_bytes=2**18, cuda_graphs=True, max_num_seqs=6)
    with InferenceEngine(model, config) as plain:
        expected, num_blocks = plain.generate([[5, 6, 7], [1]], params, progress=False), plain.num_blocks
    asked = SpeculativeConfig(method="draft_model", model=str(tmp_path), adaptive=False)
    with InferenceEngine(model, config.replace(speculative=asked)) as engine:
        assert engine.num_blocks == num_blocks // 2  # the models are equal
        replays, replay = [], DecodeGraphs.replay
        monkeypatch.setattr(DecodeGraphs, "replay", lambda self, size: replays.append(self) or replay(self, size))
        same(engine.generate([[5, 6, 7], [1]], params, progress=False), expected)
        assert len(set(replays)) == 1  # the draft model's
        engine.disable_spec_decoding()
        same(engine.generate([[5, 6, 7], [1]], params, progress=False), expected)
        assert len(set(replays)) == 2  # and the target's


@pytest.mark.parametrize("name", ["right", "noisy"])
def test_sequences_that_the_draft_model_cannot_follow(name: str, tmp_path: Path) -> None:
    """Its positions end before the target's do."""
    model = make_llama()
    short = make_llama(max_position_embeddings=20)
    short.load_state_dict((model if name == "right" else noisy(model, 0.12)).state_dict())
    short.save_pretrained(tmp_path)
    with InferenceEngine(model, InferenceConfig(**COMMON, num_kv_blocks=64)) as engine:
        expected = engine.generate([[5, 6, 7], list(range(30))], {"temperature": 0, **LONG}, progress=False)
        engine.enable_spec_decoding({"method": "draft_model", "model": str(tmp_path), "adaptive": False})
        outputs = engine.generate([[5, 6, 7], list(range(30))], {"temperature": 0, **LONG}, progress=False)
        same(outputs, expected)
        assert outputs[0].num_drafted > 10 and outputs[1].num_drafted == 0


def test_the_distribution_is_the_targets(tmp_path: Path) -> None:
    """Pairs of tokens, the second of which was drafted: chi-square against the exact probabilities."""
    model = make_llama(vocab_size=7, initializer_range=0.2)
    noisy(model, 0.5).save_pretrained(tmp_path)
    prompt, count, size = [1, 2], 1200, 7
    with torch.inference_mode():
        rows = model(torch.tensor([[*prompt, token] for token in range(size)])).logits.double().softmax(-1)
    probabilities = (rows[0, 1].unsqueeze(1) * rows[:, 2]).flatten().numpy()
    config = InferenceConfig(
        **{**COMMON, "max_num_batched_tokens": 2048}, num_kv_blocks=600, enable_prefix_caching=False
    )
    with InferenceEngine(model, config) as engine:
        engine.enable_spec_decoding({"method": "draft_model", "model": str(tmp_path), "adaptive": False})
        params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=3, ignore_eos=True) for seed in range(count)]
        outputs = engine.generate([prompt] * count, params, progress=False)
    drafted, accepted = sum(o.num_drafted for o in outputs), sum(o.num_accepted for o in outputs)
    assert drafted > 0.9 * count and 0.3 * drafted < accepted < 0.9 * drafted
    counts = np.bincount([size * o.token_ids[0] + o.token_ids[1] for o in outputs], minlength=size**2)
    rare = probabilities * count < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(probabilities[~rare], probabilities[rare].sum()) * count
    statistic = ((observed - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
    freedom = torch.tensor(float((wanted > 0).sum() - 1))
    assert torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2)) > 1e-3  # of chi-square, beyond it


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_leaves_all_as_it_was(drafts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama(vocab_size=103).save_pretrained(tmp_path / "other vocabulary")
    make_llama().save_pretrained(tmp_path / "other tokens")
    make_tokenizer(101, first="zero").save_pretrained(tmp_path / "other tokens")
    make_llama().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")

    def of(name: str) -> dict[str, str]:
        return {"method": "draft_model", "model": str(tmp_path / name)}

    with InferenceEngine(make_llama(), InferenceConfig(**COMMON, num_kv_blocks=40), make_tokenizer(101)) as engine:
        engine.enable_spec_decoding(speculation("right", drafts))
        for asked, error, message in (
            ("eagle", ConfigError, "SpeculativeConfig.method: 'eagle' is not valid: must be one of 'ngram'"),
            (None, TypeError, "enable_spec_decoding: None is no SpeculativeConfig"),
            (3, TypeError, "speculative: a int is no SpeculativeConfig"),
            (of("nowhere"), ValueError, "nowhere does not exist"),
            (of("broken"), ValueError, "config.json"),
            (
                of("other vocabulary"),
                ConfigError,
                "has a vocabulary of 103 tokens, and the model .* has 101; they must",
            ),
            (of("other tokens"), ConfigError, "has another tokenizer .*: 'w0' is token None, not 0"),
        ):
            with pytest.raises(error, match=message) as caught:
                engine.enable_spec_decoding(asked)  # type: ignore[arg-type]
            assert "\n" not in str(caught.value)
        monkeypatch.setattr("meshlm.engine.worker.available_bytes", lambda _: 1000)
        with pytest.raises(ConfigError, match=r"KV cache does not fit: 40 blocks take .* on cpu, 0\.0 MiB is free"):
            engine.enable_spec_decoding(speculation("noisy", drafts))
        assert engine.speculative == speculation("right", drafts) and engine.ranks[0].draft is not None
        output = engine.generate([5, 6, 7], {"temperature": 0, **LONG}, progress=False)[0]
        assert output.num_accepted == output.num_drafted > 10


@pytest.mark.parametrize("before", [None, "suffix", "right"])
@pytest.mark.parametrize("fails", ["cache", "capture"])
def test_what_fails_when_the_draft_model_before_is_gone(
    before: str | None, fails: str, drafts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody drafts with a model that is not there; who needs none goes on."""
    model, params, capture = make_llama(head_dim=16), {"temperature": 0, **LONG}, Worker.capture
    model.save_pretrained(tmp_path)
    asked = {"method": "draft_model", "model": str(tmp_path), "adaptive": False}

    def no_cache(stage: Any, num_blocks: int, block_size: int) -> KVCache:
        if num_blocks == 40:
            raise MemoryError("out of it")
        return KVCache(stage, num_blocks, block_size)

    with InferenceEngine(model, InferenceConfig(**COMMON, num_kv_blocks=40, cuda_graphs=True)) as engine:
        expected = engine.generate([[5, 6, 7], [1]], params, progress=False)
        if before is not None:
            engine.enable_spec_decoding(asked if before == "right" else before)
        speculator = engine._core.replicas[0].scheduler.speculator
        with monkeypatch.context() as patch:
            if fails == "cache":
                patch.setattr("meshlm.engine.worker.KVCache", no_cache)
            else:
                patch.setattr(
                    Worker, "capture", lambda self, model, size: "no graphs" if model else capture(self, 0, size)
                )
            with pytest.raises(ValueError, match=r"SpeculativeConfig\.model: .*(40 blocks: out of it|no graphs)"):
                engine.enable_spec_decoding(asked)
        assert engine.speculative == (as_speculative_config(before) if before == "suffix" else None)
        assert engine._core.replicas[0].scheduler.speculator is (speculator if before == "suffix" else None)
        assert engine.ranks[0].draft is None and "draft_model" not in engine.describe()
        same(engine.generate([[5, 6, 7], [1]], params, progress=False), expected)
        engine.enable_spec_decoding(asked)
        same(outputs := engine.generate([[5, 6, 7], [1]], params, progress=False), expected)
        assert sum(output.num_accepted for output in outputs) > 10


def test_an_interrupt_finds_it_done(drafts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_draft = Worker.try_draft

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return try_draft(*arguments)

    monkeypatch.setattr(Worker, "try_draft", interrupted)
    with InferenceEngine(make_llama(), InferenceConfig(**COMMON, num_kv_blocks=40)) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.enable_spec_decoding(speculation("right", drafts))
        assert engine.speculative is not None and engine.ranks[0].draft is not None
        output = engine.generate([5, 6, 7], {"temperature": 0, **LONG}, progress=False)[0]
        assert output.num_accepted == output.num_drafted > 10


def test_a_draft_model_is_checked_against_the_mesh(drafts: Path) -> None:
    draft = open_checkpoint(drafts / "wrong").spec
    config = InferenceConfig(**COMMON, pp_size=3)
    with pytest.raises(
        ConfigError, match="draft model does not go with this mesh: pp_size=3 is more than the model's 2 layers"
    ):
        plan.check_draft(config, draft, [torch.device("cpu")] * 3)


def test_a_target_and_a_draft_model_that_do_not_fit_together(drafts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, size = open_checkpoint(drafts / "right").spec, sum(p.numel() * 4 for p in make_llama().parameters())
    monkeypatch.setattr(plan, "available_bytes", lambda _: 3 * size // 2)
    config, devices = InferenceConfig(**COMMON), [torch.device("cpu")]
    plan.check_fit(config, spec, devices)
    with pytest.raises(ConfigError, match="the model with its draft model does not fit"):
        plan.check_fit(config, spec, devices, draft=spec)


# ---- the scheduler's part --------------------------------------------------------------------------------------------


class Guesser(Speculator):
    """Guesses tokens 10, 11, 12, ...; what it is told of them."""

    def __init__(self) -> None:
        super().__init__(SpeculativeConfig(num_speculative_tokens=4))
        self.observed: list[tuple[int, int]] = []

    def propose(self, sequence: Sequence, most: int, batch_size: int) -> list[int]:
        return list(range(10, 10 + min(most, self.max_tokens)))

    def observe(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        self.observed.append((num_drafted, num_accepted))


class Below:
    """A grammar that allows tokens below a number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    error = None

    def masks(self, drafts: Seq[int]) -> tuple[Any, int]:
        num_valid = next((i for i, token in enumerate(drafts) if token >= self.limit), len(drafts))
        return np.full((num_valid + 1, 1), len(drafts), dtype=np.int32), num_valid

    def accept(self, token_id: int) -> str | None:
        return None


def scheduler(num_blocks: int = 64, **values: Any) -> Scheduler:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **values}
    return Scheduler(BlockManager(num_blocks, 4), **values)


def run(scheduler: Scheduler, draw: Callable[[Sequence, int], int]) -> tuple[int, dict[str, int]]:
    """One step: of which model, and the tokens of each sequence. draw: from a sequence and its row's place."""
    step = scheduler.schedule()
    assert step is not None
    drawers = [(sequence, i) for sequence, drafts in step.draws for i in range(1 + len(drafts))]
    scheduler.update(step, StepOutput(step.input.step_id, tuple(draw(*drawer) for drawer in drawers)))
    scheduler.check()
    names = [sequence.request_id for sequence in step.sequences]
    return step.input.model, dict(zip(names, step.input.query_lens, strict=True))


def test_drafts_are_cut_to_what_a_grammar_allows() -> None:
    it = scheduler()
    it.speculate(Guesser())
    sequence = Sequence("a", [1, 2], 20, constraint=Below(12))
    it.add(sequence)
    assert run(it, lambda s, i: 10 + i) == (0, {"a": 4})  # the prompt, 10, 11
    assert sequence.output_token_ids == [10, 11, 12]
    assert (sequence.num_drafted, sequence.num_accepted) == (2, 2)


def test_a_draft_model_stops_at_what_a_grammar_forbids_and_at_an_end() -> None:
    it = scheduler()
    config = SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=4, adaptive=False)
    it.speculate(create_speculator(config, longest=100))
    it.add(Sequence("a", [1, 2], 20, constraint=Below(12)))
    it.add(Sequence("b", [1, 3], 20, stop_token_ids=frozenset({11})))
    assert run(it, lambda s, i: 5) == (0, {"a": 2, "b": 2})
    guesses = iter([10, 10, 11, 11, 12])
    assert run(it, lambda s, i: next(guesses)) == (1, {"a": 3, "b": 3})
    assert run(it, lambda s, i: next(guesses)) == (1, {"a": 1, "b": 1})  # b drafts its end
    assert run(it, lambda s, i: next(guesses)) == (1, {"a": 1})  # and a what may not be
    assert run(it, lambda s, i: 9) == (0, {"a": 3, "b": 3})


def test_everybodys_own_token_comes_before_drafts() -> None:
    it, guesser = scheduler(max_num_batched_tokens=6), Guesser()
    for name in "abcd":
        it.add(Sequence(name, [1], 20))
    run(it, lambda s, i: 7)
    it.speculate(guesser)
    assert run(it, lambda s, i: 7) == (0, {"a": 3, "b": 1, "c": 1, "d": 1})
    assert guesser.observed[-4:] == [(2, 0), (0, 0), (0, 0), (0, 0)]


def test_the_rows_of_drafts_in_a_step_are_bounded() -> None:
    """Logits take memory that is not measured for more."""
    it = scheduler(num_blocks=800, max_num_seqs=200, max_num_batched_tokens=2048)
    for number in range(100):
        it.add(Sequence(f"guessed {number}", [1], 20))
    run(it, lambda s, i: 7)
    it.speculate(Guesser())
    for number in range(20):
        it.add(Sequence(f"forced {number}", [1], 40, forced=(2,) * 40))
    assert sum(run(it, lambda s, i: 2)[1].values()) == 100 + 20 + MAX_DRAFTS


def test_a_draft_model_draws_no_more_than_a_step_can_check() -> None:
    it = scheduler(max_num_batched_tokens=8)
    config = SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=4, adaptive=False)
    it.speculate(create_speculator(config, longest=100))
    for name in "abc":
        it.add(Sequence(name, [1], 20))
    assert run(it, lambda s, i: 7) == (0, {"a": 1, "b": 1, "c": 1})
    assert run(it, lambda s, i: 7) == (1, {"a": 2, "b": 2, "c": 2})
    assert run(it, lambda s, i: 7) == (0, {"a": 2, "b": 2, "c": 2})


def test_no_block_is_taken_for_drafts_that_another_will_need() -> None:
    it = scheduler(num_blocks=5)
    it.add(Sequence("a", [1, 2, 3, 4], 9))
    it.add(Sequence("b", [5, 6, 7], 9))
    run(it, lambda s, i: 7)
    it.speculate(Guesser())
    assert run(it, lambda s, i: 7)[1] == {"a": 4, "b": 1}  # what has room in the block that is needed anyway


def test_the_shares_of_stages_do_not_count_drafts() -> None:
    it = scheduler(num_stages=2)
    it.speculate(Guesser())
    for name in "abcd":
        it.add(Sequence(name, [1], 20))
    first, second = it.schedule(), it.schedule()
    assert first is not None and second is not None
    assert [len(step.sequences) for step in (first, second)] == [2, 2]


def test_steps_of_both_models_are_in_flight_on_disjoint_sequences() -> None:
    it = scheduler(num_stages=2)
    config = SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=2, adaptive=False)
    it.speculate(create_speculator(config, longest=100))
    for name in "abcd":
        it.add(Sequence(name, [1, 2], 40))
    seen, flight = set(), []
    for _ in range(60):
        while len(flight) < 2 and (step := it.schedule()) is not None:
            flight.append(step)
        names = [sequence.request_id for step in flight for sequence in step.sequences]
        assert len(names) == len(set(names))
        seen.add(tuple(sorted(step.input.model for step in flight)))
        step = flight.pop(0)
        it.update(step, StepOutput(step.input.step_id, (7,) * len(step.input.samples)))
    assert {(0, 1), (1, 1)} <= seen


def test_nothing_is_scheduled_ahead_of_guesses() -> None:
    it = scheduler(look_ahead=True)
    assert it.max_in_flight == 2
    it.speculate(Guesser())
    assert it.max_in_flight == 1
    it.speculate(None)
    assert it.max_in_flight == 2


# ---- the configuration -----------------------------------------------------------------------------------------------


def test_configured_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ngram = SpeculativeConfig(method="ngram")
    for given in ("ngram", {"method": "ngram"}, ngram):
        assert InferenceConfig(speculative=given).speculative == ngram  # type: ignore[arg-type]
    (tmp_path / "c.yaml").write_text("speculative:\n  method: ngram\n")
    assert InferenceConfig.from_file(tmp_path / "c.yaml").speculative == ngram
    for text in ("ngram", '{"method": "ngram"}'):
        monkeypatch.setenv("MESHLM_SPECULATIVE", text)
        assert InferenceConfig().speculative == ngram
    monkeypatch.setenv("MESHLM_SPECULATIVE", "none")
    assert InferenceConfig().speculative is None
    with pytest.raises(ConfigError, match=r"method: 'eagle' is not valid") as caught:
        InferenceConfig(speculative="eagle")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert InferenceConfig().speculative is None
