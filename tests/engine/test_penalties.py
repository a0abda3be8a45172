"""What shapes logits, through the engine: transformers' `generate` gives the same tokens for the same GenerationConfig.

On several meshes, in batches where each request asks for something else, with chunks, preemption, and drafts of which
some are wrong.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from meshlm import InferenceConfig, InferenceEngine, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS = 16
TIE = 1e-3  # scores: closer ones may change places
PROMPTS = [torch.randint(101, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 24, 40)]


@dataclass(frozen=True)
class Generated:
    token_ids: list[int]
    scores: list[Tensor]  # [vocab] of each, processed

    def check(self, token_ids: Sequence[int]) -> None:
        """Token for token, up to the first that is as good as transformers' own."""
        for mine, wanted, scores in zip(token_ids, self.token_ids, self.scores, strict=False):
            if mine != wanted:
                assert scores[wanted] - scores[mine] < TIE, (token_ids, self.token_ids)
                return
        assert list(token_ids) == self.token_ids


def by_transformers(model: Any, prompt: Sequence[int], config: GenerationConfig) -> Generated:
    given = torch.tensor([list(prompt)])
    made = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        generation_config=config,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return Generated(made.sequences[0, len(prompt) :].tolist(), [scores[0] for scores in made.scores])


def greedy(**values: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0, **values)


def shaping(usual: Sequence[int]) -> list[dict[str, Any]]:
    """Settings that change an output which without them is `usual`."""
    first, second, third, *_, last = dict.fromkeys(usual)
    return [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[first], [second, third], [3, third, last]]},
        {"suppress_tokens": [second, third]},
        {"begin_suppress_tokens": [first, last]},
        {"min_new_tokens": 6, "eos_token_id": [second, third]},
        {"sequence_bias": {(second,): -4.0, (last,): 3.5, (first + 1,): 2.0}},
        {
            "repetition_penalty": 1.1, "no_repeat_ngram_size": 2, "bad_words_ids": [[first], [third, last]],
            "suppress_tokens": [second], "sequence_bias": {(last,): -1.0}, "min_new_tokens": 9, "eos_token_id": 1,
        },
    ]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tiny_model: LlamaForCausalLM) -> list[tuple[list[int], GenerationConfig, Generated]]:
    """Made once for all meshes."""
    cases = []
    for prompt in PROMPTS:
        usual = by_transformers(tiny_model, prompt, greedy())
        for values in shaping(usual.token_ids):
            config = greedy(**values)
            cases.append((prompt, config, by_transformers(tiny_model, prompt, config)))
            assert values.get("no_repeat_ngram_size") == 3 or cases[-1][2].token_ids != usual.token_ids, values
    return cases


@contextmanager
def drafting(engine: InferenceEngine, outputs: dict[tuple[int, ...], Sequence[int]]) -> Iterator[None]:
    """Drafts for prompts whose output is known: three, and of every five one is wrong."""

    def propose(sequence: Any, most: int) -> list[int]:
        known = outputs.get(tuple(sequence.token_ids[: sequence.num_prompt_tokens]), ())
        first = sequence.num_output_tokens
        guesses = known[first : first + min(most, 3)]
        return [token + (place % 5 == 4) for place, token in enumerate(guesses, start=first)]

    schedulers = [replica.scheduler for replica in engine._core.replicas]
    for scheduler in schedulers:
        scheduler.propose = propose
    yield
    for scheduler in schedulers:
        scheduler.propose = None


@pytest.mark.parametrize("drafts", [False, True])
def test_greedy_output_is_transformers(tiny_engine: InferenceEngine, expected: Any, drafts: bool) -> None:
    before = tiny_engine.stats().num_preemptions
    with drafting(tiny_engine, {tuple(prompt): made.token_ids for prompt, _, made in expected} if drafts else {}):
        outputs = tiny_engine.generate([p for p, _, _ in expected], [c for _, c, _ in expected], progress=False)
    for output, (_, _, made) in zip(outputs, expected, strict=True):
        made.check(output.token_ids)
    assert drafts or tiny_engine.stats().num_preemptions > before


def test_presence_and_frequency(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    """Of tokens in the output only, after the repetition penalty, which is of the prompt's too."""
    kinds = [(2.0, 0.0, 1.0), (0.0, 1.5, 1.0), (-1.0, -0.5, 1.0), (1.0, 1.0, 1.2)]
    params = [
        SamplingParams(
            presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition,
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True,
        )
        for presence, frequency, repetition in kinds
    ]  # fmt: skip
    outputs = tiny_engine.generate(PROMPTS, params, progress=False)
    for prompt, output, (presence, frequency, repetition) in zip(PROMPTS, outputs, kinds, strict=True):
        tokens = list(prompt)
        for token in output.token_ids:
            with torch.no_grad():
                logits = tiny_model(torch.tensor([tokens])).logits[0, -1].clone()
            seen = torch.tensor(tokens).unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
            counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=torch.int64), minlength=101)
            logits -= frequency * counts + presence * (counts > 0)
            assert logits[token] >= logits.max() - TIE
            tokens.append(token)


def test_one_that_has_no_token_left_fails_alone(tiny_engine: InferenceEngine) -> None:
    few = {"allowed_token_ids": [0, 3, 70], "no_repeat_ngram_size": 1, "max_tokens": 9}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, **few},
        {"temperature": 1.0, "top_k": 5, "seed": 1, **few},
        {"temperature": 0, "max_tokens": 9},
        {"temperature": 0, **few, "forced_token_ids": [0, 3, 70, 5, 5]},
        {"num_beams": 2, **few},
    ]
    prompts = [[5, 6, 7]] * len(kinds)
    for drafts in ({}, {(5, 6, 7): (3, 70, 0, 0, 0)}):
        with drafting(tiny_engine, drafts):
            greedy, sampled, free, forced, beams = tiny_engine.generate(prompts, kinds, progress=False)
        for output in (greedy, sampled):
            assert sorted(output.token_ids) == [0, 3, 70] and output.finish_reason == "error"
            assert (output.error or "").startswith("no token is left to be drawn: ")
        assert free.finish_reason == "length" and len(free.token_ids) == 9
        assert forced.token_ids == (0, 3, 70, 5, 5) and forced.finish_reason == "error"
        assert "no token is allowed to come next" in (beams.error or "")


# ---- users' processors ----------------------------------------------------------------------------------------------


def params(*processors: Callable[..., Any], **values: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "logits_processors": processors, **values}
    )


def test_users_processors(tiny_engine: InferenceEngine) -> None:
    banned = [3, 14, 15]

    def ban(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        return logits.index_fill(0, torch.tensor(banned), -torch.inf)  # in what it closes over

    def echo(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        """The prompt, from its end to its start."""
        return logits + 1e4 * torch.nn.functional.one_hot(torch.tensor([*prompt, *output[::-1]][-1]), 101)

    pairs = [
        (params(ban), params(suppress_tokens=banned)),
        (params(RepetitionPenaltyLogitsProcessor(1.4)), params(repetition_penalty=1.4)),
        (params(ban, lambda prompt, output, logits: logits - 0.1 * torch.arange(101)), params(ban)),
        (params(ban, temperature=1.0, seed=3), params(suppress_tokens=banned, temperature=1.0, seed=3)),
    ]
    prompt = PROMPTS[1]
    mine, equal = (
        [output.token_ids for output in tiny_engine.generate([prompt] * len(side), list(side), progress=False)]
        for side in zip(*pairs, strict=True)
    )
    assert [a == b for a, b in zip(mine, equal, strict=True)] == [True, True, False, True]
    assert len(set(mine)) == 4
    (echoed,) = tiny_engine.generate(prompt, params(echo, max_tokens=3), progress=False)
    assert echoed.token_ids == (prompt[-1],) * 3


def test_one_that_fails_fails_alone(tiny_engine: InferenceEngine) -> None:
    def fails(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        if len(output) == 3:
            raise KeyError("no such\nthing")
        return logits

    prompts, free = [PROMPTS[1]] * 4, params()
    mixed = [free, params(fails), params(lambda p, o, logits: logits[:5]), params(lambda p, o, logits: logits)]
    (usual,) = tiny_engine.generate(prompts[0], free, progress=False)
    for drafts in ({}, {tuple(prompts[0]): usual.token_ids}):
        with drafting(tiny_engine, drafts):
            first, failed, wrong, last = tiny_engine.generate(prompts, mixed, progress=False)
        assert first.token_ids == last.token_ids == usual.token_ids
        assert first.error is last.error is None and last.finish_reason == "length"
        assert (failed.finish_reason, failed.token_ids) == ("error", usual.token_ids[:3])
        assert failed.error == "SamplingParams.logits_processors[0] raised KeyError: 'no such\\nthing'"
        assert (wrong.finish_reason, wrong.token_ids) == ("error", ())
        assert wrong.error == "SamplingParams.logits_processors[0] returned a tensor [5]: it must be [101]"


def test_what_cannot_be_sent_is_refused(tiny_engine: InferenceEngine) -> None:
    lock = threading.Lock()

    def locked(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        with lock:
            return logits

    given = ([PROMPTS[0]] * 2, [params(), params(lambda p, o, logits: logits, locked)])
    if tiny_engine.config.world_size == 1:
        assert [output.error for output in tiny_engine.generate(*given, progress=False)] == [None, None]
        return
    message = r"^prompts\[1\]: SamplingParams.logits_processors\[1\]: <function .*locked.* cannot be sent to the ranks'"
    with pytest.raises(ValueError, match=message) as caught:
        tiny_engine.generate(*given, progress=False)
    assert "\n" not in str(caught.value)


# ---- the real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_demo_model(demo_model: Path) -> list[tuple[list[int], GenerationConfig, Generated]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompt = tokenizer.encode("The three laws of robotics are: 1.")
    usual = by_transformers(model, prompt, greedy()).token_ids
    configs = [greedy(**values) for values in shaping(usual)[::3]]  # the last is all at once
    return [(prompt, config, by_transformers(model, prompt, config)) for config in configs]


@pytest.mark.slow  # the real model, by transformers too
@pytest.mark.parametrize("mesh", [{}, {"tp_size": 2, "pp_size": 2}], ids=["1", "tp2 pp2"])
def test_the_demo_model(demo_model: Path, of_demo_model: Any, mesh: dict[str, int]) -> None:
    config = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=64, **mesh)
    with InferenceEngine(demo_model, config) as engine:
        outputs = engine.generate([p for p, _, _ in of_demo_model], [c for _, c, _ in of_demo_model], progress=False)
    for output, (_, _, made) in zip(outputs, of_demo_model, strict=True):
        made.check(output.token_ids)


SCRIPT = """
from meshlm import InferenceConfig, InferenceEngine

step = 3
config = InferenceConfig(pp_size=2, device="cpu", dtype="float32", num_kv_blocks=16)
engine = InferenceEngine({model!r}, config)
params = dict(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)
params["logits_processors"] = lambda prompt, output, logits: logits.index_fill(0, logits.argmax(), step - 1e9)
print(*engine.generate([5, 6, 7], params, progress=False)[0].token_ids)
"""


@pytest.mark.slow  # a process and its ranks
def test_a_lambda_of_a_script(tiny_model: LlamaForCausalLM, tmp_path: Path) -> None:
    """Of `__main__`, which has no guard, and with a global of it: always the second best."""
    tiny_model.save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT.format(model=str(tmp_path / "model")))
    run = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    tokens = [5, 6, 7]
    for token in map(int, run.stdout.split()):
        assert token == tiny_model(torch.tensor([tokens])).logits[0, -1].topk(2).indices[1]
        tokens.append(token)
    assert len(tokens) == 8
