"""Beam search is transformers' `generate`, token for token, however it is scheduled."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import COMMON, CUTS, PROMPT, one, running, syllables, told
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, RequestOutput, SamplingParams
from meshlm.engine.beam_search import BeamSearch, num_candidates
from meshlm.engine.sequence import Sequence
from meshlm.engine.step import TokenLogprobs
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [PROMPT, [3], [50, 4, 9, 9, 9]]
ENDS = list(range(0, 101, 4))
SHAPES: list[dict[str, Any]] = [
    {},
    {"eos_token_id": ENDS, "max_new_tokens": 16},
    {"eos_token_id": 5, "min_new_tokens": 4},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2, "eos_token_id": [5, 17, 30, 61]},
    {"suppress_tokens": [1, 2, 3, 60, 61, 62], "begin_suppress_tokens": [30]},
]
STOPPING = list(itertools.product((1.0, 0.0, -1.5, 3.0), (False, True, "never")))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return syllables()


@pytest.fixture(scope="module")
def shared(model: LlamaForCausalLM, tokenizer: Any) -> Iterator[InferenceEngine]:
    with running(model, tokenizer, num_kv_blocks=128) as engine:
        yield engine


def by_transformers(model: Any, prompt: list[int], fields: dict[str, Any]) -> tuple[list[tuple[int, ...]], list[float]]:
    """Outputs as they are without padding, and their scores."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        generation_config=GenerationConfig(
            **fields, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True
        ),
    )
    ends = fields["eos_token_id"] or []
    ends = [ends] if isinstance(ends, int) else ends
    rows = made.sequences[:, len(prompt) :].tolist()
    lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
    return [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)], made.sequences_scores.tolist()


def score(output: RequestOutput, length_penalty: float) -> list[float]:
    return [(c.cumulative_logprob or 0.0) / len(c.token_ids) ** length_penalty for c in output.outputs]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_equals_transformers(model: LlamaForCausalLM, shared: InferenceEngine, shape: int) -> None:
    configs = [
        {"num_beams": 2 + i % 4, "num_return_sequences": 2 + i % 3 % (1 + i % 4), "max_new_tokens": 7, **SHAPES[shape]}
        | {"length_penalty": penalty, "early_stopping": early, "eos_token_id": SHAPES[shape].get("eos_token_id", [])}
        for i, (penalty, early) in enumerate(STOPPING)
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(configs))]
    outputs = shared.generate(prompts, [GenerationConfig(**fields) for fields in configs], progress=False)  # in a batch
    for prompt, fields, output in zip(prompts, configs, outputs, strict=True):
        token_ids, scores = by_transformers(model, prompt, {**fields, "eos_token_id": fields["eos_token_id"] or None})
        assert [c.token_ids for c in output.outputs] == token_ids, fields
        assert score(output, fields["length_penalty"]) == pytest.approx(scores, rel=1e-4)
        for completion in output.outputs:
            ends = completion.token_ids[-1] in torch.tensor(fields["eos_token_id"]).view(-1).tolist()
            assert completion.finish_reason == ("stop" if ends else "length")


def test_ends_are_met_in_these(model: LlamaForCausalLM, shared: InferenceEngine) -> None:
    """Guards the test above: beams do end early, and stop the search differently."""
    fields = {"num_beams": 2, "n": 2, "max_tokens": 20, "eos_token_ids": ENDS}
    steps: dict[Any, int] = {}
    for early in (True, False, "never"):
        before = shared.stats().replicas[0].num_steps
        output = one(shared, {**fields, "early_stopping": early})
        steps[early] = shared.stats().replicas[0].num_steps - before
        assert any(c.finish_reason == "stop" for c in output.outputs)
    assert steps[True] < steps[False] < steps["never"]


@pytest.mark.parametrize("cut", CUTS)
def test_however_it_is_scheduled(model: LlamaForCausalLM, shared: InferenceEngine, cut: str) -> None:
    """Beside each other, with a sampled request, preempted."""
    params: list[dict[str, Any]] = [
        {"num_beams": 3, "n": 3, "max_tokens": 8, "presence_penalty": 0.5},
        {"num_beams": 2, "n": 2, "max_tokens": 8, "eos_token_ids": [5, 17, 30, 61], "priority": 1},
        {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 8},
    ]
    expected = [told(one(shared, each)) for each in params]
    with running(model, **{**CUTS[cut], **({"num_kv_blocks": 14} if "few" in cut else {})}) as engine:
        assert [told(output) for output in engine.generate([PROMPT] * 3, params, progress=False)] == expected
        assert ("few" in cut) == (engine.stats().num_preemptions > 0)


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_a_beam_as_an_end_token_does(shared: InferenceEngine, tokenizer: Any, include: bool) -> None:
    fields = {"num_beams": 4, "n": 4, "max_tokens": 12, "eos_token_ids": []}
    free = one(shared, fields)
    stop = free.outputs[2].token_ids[3]
    by_token = one(shared, {**fields, "stop_token_ids": [stop]})
    by_text = one(shared, {**fields, "stop": tokenizer.decode([stop]), "include_stop_str_in_output": include})
    assert [c.token_ids for c in by_text.outputs] == [c.token_ids for c in by_token.outputs]
    reasons = [c.finish_reason for c in by_text.outputs]
    assert reasons == [c.finish_reason for c in by_token.outputs] and "stop" in reasons
    for completion in by_text.outputs:
        stopped = completion.finish_reason == "stop"
        assert completion.stop_reason == (tokenizer.decode([stop]) if stopped else None)
        kept = completion.token_ids[: -1 if stopped and not include else None]
        assert completion.text == tokenizer.decode(kept)


def test_a_stop_string_over_several_tokens(shared: InferenceEngine, tokenizer: Any) -> None:
    fields = {"num_beams": 3, "n": 3, "max_tokens": 10, "eos_token_ids": []}
    free = one(shared, fields).outputs[0]
    stop = free.text[3:7]  # from within a syllable to within another
    stopped = one(shared, {**fields, "stop": [stop], "length_penalty": 0.0})
    assert any(c.finish_reason == "stop" for c in stopped.outputs)
    for completion in stopped.outputs:
        text = tokenizer.decode(completion.token_ids)
        assert stop not in completion.text
        if completion.finish_reason == "stop":
            assert stop in text and stop not in tokenizer.decode(completion.token_ids[:-1])
            assert completion.text == text[: text.index(stop)]


def test_the_search_is_told_in_the_end(shared: InferenceEngine) -> None:
    *before, last = shared.stream(PROMPT, {"num_beams": 3, "n": 2, "max_tokens": 5})
    assert before and all(c.text == "" and c.finish_reason is None for output in before for c in output.outputs)
    assert len(last.outputs) == 2 and all(c.delta == c.text != "" for c in last.outputs)
    assert [c.index for c in last.outputs] == [0, 1] and last.timings.ttft_s is not None
    scores = score(last, 1.0)
    assert scores == sorted(scores, reverse=True)


def test_the_prompts_logprobs_are_told_too(shared: InferenceEngine) -> None:
    expected = one(shared, {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}).prompt_logprobs
    output = one(shared, {"num_beams": 3, "max_tokens": 4, "prompt_logprobs": 1})
    assert output.prompt_logprobs == expected and len(output.prompt_logprobs or ()) == len(PROMPT)


def test_fewer_outputs_where_there_are_no_more(shared: InferenceEngine) -> None:
    fields = {"num_beams": 4, "n": 4, "max_tokens": 3}
    assert [c.token_ids for c in one(shared, {**fields, "allowed_token_ids": [8]}).outputs] == [(8, 8, 8)]
    both = one(shared, {**fields, "allowed_token_ids": [8, 9], "max_tokens": 1})
    assert {c.token_ids for c in both.outputs} == {(8,), (9,)}
    none = one(shared, {**fields, "allowed_token_ids": [8, 9], "no_repeat_ngram_size": 1}, [1])
    assert none.error == "num_beams=4: no token is allowed to come next"
    assert {c.token_ids for c in none.outputs} == {(8, 9), (9, 8)}


def test_a_search_fails_alone(shared: InferenceEngine) -> None:
    def spoil(prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            raise RuntimeError("enough of this")
        return logits

    fields: dict[str, Any] = {"num_beams": 3, "n": 2, "max_tokens": 5}
    expected = one(shared, fields)
    spoiled, other = shared.generate([PROMPT] * 2, [{**fields, "logits_processors": [spoil]}, fields], progress=False)
    assert "enough of this" in (spoiled.error or "")
    assert {c.finish_reason for c in spoiled.outputs} == {"error"} and len(spoiled.outputs) == 2
    assert told(other) == told(expected)


def test_a_length_penalty_beyond_all_measure_breaks_nothing(shared: InferenceEngine) -> None:
    for penalty in (1e4, -1e4):
        assert one(shared, {"num_beams": 3, "max_tokens": 4, "length_penalty": penalty}).finish_reason == "length"


# ---- the bookkeeping alone ------------------------------------------------------------------------------------------


def choose(search: BeamSearch, *told: dict[int, float]) -> list[tuple[int, int]]:
    """What the beams go on with, given the log-probabilities of what may follow each."""
    for sequence, logprobs in zip(search.sequences, told, strict=True):
        sequence.candidates = TokenLogprobs(0.0, 0, tuple(logprobs), tuple(logprobs.values()))
    chosen = search.choose()
    heirs = [search.sequences[c.beam].fork() for c in chosen]
    for heir, c in zip(heirs, chosen, strict=True):
        heir.token_ids.append(c.token_id)
    search.follow(chosen, heirs)
    return [(c.beam, c.token_id) for c in chosen]


def test_what_is_found_and_what_goes_on() -> None:
    """The example at the top of beam_search.py."""
    end, x, y = 0, 1, 2
    root = Sequence("a", [9], max_tokens=9, stop_token_ids=frozenset({end}), num_candidates=num_candidates(2, 1))
    params = SamplingParams(num_beams=2, n=2).resolve(SamplingParams())
    search = BeamSearch(root, params, lambda: None)

    assert choose(search, {x: -1.0, y: -1.1, end: -9.0}) == [(0, x), (0, y)]
    assert choose(search, {x: -0.3, end: -0.6, y: -5.0}, {y: -0.6, end: -0.8, x: -5.0}) == [(0, x), (1, y)]
    (found,) = search.found
    assert found.sequence.output_token_ids == [x, end] and found.score == pytest.approx(-1.6 / 2)
    assert choose(search, {end: -0.1, x: -4.0}, {end: -0.1, x: -3.0}) == [], "two are found that no beam can better"
    assert [h.sequence.output_token_ids for h in search.outputs()] == [[x, x, end], [y, y, end]]


def test_a_negative_length_penalty_leaves_never_to_the_length_so_far() -> None:
    """A longer output only becomes worse then; the length limit says nothing about what goes on."""
    root = Sequence("a", [9], max_tokens=9, stop_token_ids=frozenset({0}), num_candidates=num_candidates(2, 1))
    params = SamplingParams(num_beams=2, length_penalty=-1.0, early_stopping="never").resolve(SamplingParams())
    search = BeamSearch(root, params, lambda: None)
    assert choose(search, {1: -0.5, 0: -0.6, 2: -0.7}) == [(0, 1), (0, 2)]
    assert choose(search, {1: -0.05, 0: -0.1}, {1: -5.0, 2: -5.0}) == [(0, 1), (1, 1)], "-0.55 * 2 is better than -1.2"


# ---- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_model(demo_model: Path) -> None:
    """Real text, end tokens and stop strings against transformers."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    module = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False),
        tokenizer.encode("Once upon a time"),
    ]
    eos = tokenizer.eos_token_id
    fields: list[dict[str, Any]] = [
        {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": eos, "early_stopping": True},
        {
            "num_beams": 3,
            "num_return_sequences": 3,
            "max_new_tokens": 14,
            "no_repeat_ngram_size": 3,
            "eos_token_id": eos,
        },
    ]
    with InferenceEngine(demo_model, InferenceConfig(**{**COMMON, "num_kv_blocks": 256}), tokenizer) as engine:
        for prompt, different in itertools.product(prompts, fields):
            each = {"num_return_sequences": 3, "max_new_tokens": 14, "eos_token_id": eos, **different}
            (output,) = engine.generate([prompt], GenerationConfig(**each), progress=False)
            token_ids, scores = by_transformers(module, prompt, each)
            assert [c.token_ids for c in output.outputs] == token_ids
            assert score(output, 1.0) == pytest.approx(scores, rel=1e-3)
        stop = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 14, "stop_strings": [", ", " little"]}
        made = module.generate(
            torch.tensor([prompts[1]]),
            attention_mask=torch.ones(1, len(prompts[1])),
            generation_config=GenerationConfig(**stop, do_sample=False, pad_token_id=0, eos_token_id=eos),
            tokenizer=tokenizer,
        )
        expected = made[:, len(prompts[1]) :].tolist()
        (output,) = engine.generate([prompts[1]], GenerationConfig(**stop, eos_token_id=eos), progress=False)
        assert any(c.finish_reason == "stop" for c in output.outputs)
        for completion, row in zip(output.outputs, expected, strict=True):
            count = len(completion.token_ids)
            assert list(completion.token_ids) == row[:count] and set(row[count:]) <= {0, eos}
        engine.check()
