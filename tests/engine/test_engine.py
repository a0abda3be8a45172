"""`InferenceEngine`'s own surface, in a world of one rank: a tiny random model with the demo model's tokenizer."""

import gc
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, RequestOutput, SamplingParams
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = InferenceConfig(device="cpu", num_kv_blocks=64, block_size=4, max_model_len=128)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama(vocab_size=49152, num_hidden_layers=2, max_position_embeddings=128, eos_token_id=2)


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model, local_files_only=True)


@pytest.fixture(scope="module")
def shared(model: LlamaForCausalLM, tokenizer: Any) -> Iterator[InferenceEngine]:
    with InferenceEngine(model, CONFIG, tokenizer) as engine:
        yield engine


@pytest.fixture
def engine(shared: InferenceEngine) -> Iterator[InferenceEngine]:
    """Idle, and left whole: no request, no block held."""
    yield shared
    assert not shared.has_unfinished() and shared.step() == []
    shared.check()
    (replica,) = shared.stats().replicas
    assert (replica.num_waiting, replica.num_running) == (0, 0)
    assert replica.num_free_blocks == replica.num_blocks == 64


def ids(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


# ---- generate -------------------------------------------------------------------------------------------------------


def test_every_kind_of_prompt(engine: InferenceEngine, tokenizer: Any) -> None:
    text_ids = tokenizer.encode("Hello there")
    chat_text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat_ids = tokenizer.encode(chat_text, add_special_tokens=False)
    single = [engine.generate(prompt, GREEDY, progress=False) for prompt in ("Hello there", text_ids, CHAT, chat_ids)]
    assert [len(outputs) for outputs in single] == [1, 1, 1, 1]
    (text,), (text_by_ids,), (chat,), (chat_by_ids,) = single
    assert text.prompt == "Hello there" and text_by_ids.prompt is None and chat.prompt == chat_text
    assert text.prompt_token_ids == text_by_ids.prompt_token_ids == tuple(text_ids)
    assert chat.prompt_token_ids == tuple(chat_ids)
    assert text.token_ids == text_by_ids.token_ids and chat.token_ids == chat_by_ids.token_ids
    for batch in (["Hello there"] * 2, [text_ids, tuple(text_ids)], [CHAT, CHAT], ["Hello there", text_ids, CHAT]):
        outputs = engine.generate(batch, GREEDY, progress=False)
        assert ids(outputs) == [chat.token_ids if prompt == CHAT else text.token_ids for prompt in batch]
        assert [output.index for output in outputs] == list(range(len(batch)))
    assert (
        engine.generate(torch.tensor(text_ids).numpy().tolist(), GREEDY, progress=False)[0].token_ids == text.token_ids
    )
    assert engine.generate([torch.tensor(t) for t in text_ids], GREEDY, progress=False)[0].token_ids == text.token_ids
    assert engine.generate([], GREEDY, progress=False) == []


def test_outputs_come_in_the_order_of_the_prompts(engine: InferenceEngine) -> None:
    prompts = [[i, i + 1] for i in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=1 + (7 * i) % 11, ignore_eos=True) for i in range(20)]
    outputs = engine.generate(prompts, params, progress=False)
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert [len(output.token_ids) for output in outputs] == [1 + (7 * i) % 11 for i in range(20)]
    assert all(output.finished and output.finish_reason == "length" for output in outputs)
    assert len({output.request_id for output in outputs}) == 20


def test_params_in_every_form(engine: InferenceEngine) -> None:
    prompt = [9, 8, 7]
    expected = engine.generate(prompt, GREEDY, progress=False)[0].token_ids
    forms = [
        {"temperature": 0, "max_tokens": 6, "ignore_eos": True},
        GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=[]),
    ]
    for form in forms:
        assert engine.generate(prompt, form, progress=False)[0].token_ids == expected
    assert ids(engine.generate([prompt] * 2, forms, progress=False)) == [expected, expected]
    plain = engine.generate(prompt, progress=False)[0]
    assert plain.token_ids[:6] == expected and len(plain.token_ids) <= 125, "the model's own defaults: greedy"


def test_end_tokens_and_stop_ids(engine: InferenceEngine) -> None:
    prompt = [9, 8, 7]
    free = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), progress=False)[0]
    place = next(i for i, token in enumerate(free.token_ids) if i > 2 and token not in free.token_ids[:i])
    token = free.token_ids[place]

    def run(**values: Any) -> RequestOutput:
        return engine.generate(prompt, SamplingParams(temperature=0, max_tokens=12, **values), progress=False)[0]

    for values in ({"stop_token_ids": [token], "ignore_eos": True}, {"eos_token_ids": [token]}):
        output = run(**values)
        assert (output.token_ids, output.finish_reason) == (free.token_ids[: place + 1], "stop")
    assert run(eos_token_ids=[token], ignore_eos=True).token_ids == free.token_ids
    late = run(eos_token_ids=[token], min_tokens=place + 3)
    assert len(late.token_ids) >= place + 3 and late.token_ids[:place] == free.token_ids[:place]
    assert token not in late.token_ids[: place + 2]


def test_stop_strings(engine: InferenceEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    free = engine.generate("Once", params, progress=False)[0]
    for stop in (free.text[5:9], free.text[8:11]):
        output = engine.generate("Once", params.model_copy(update={"stop": (stop,)}), progress=False)[0]
        assert output.text == free.text[: free.text.index(stop)]
        assert output.finish_reason == "stop" and len(output.token_ids) < 12
        assert output.token_ids == free.token_ids[: len(output.token_ids)]
    at_the_end = params.model_copy(update={"stop": (free.text[-2:],)})
    output = engine.generate("Once", at_the_end, progress=False)[0]
    assert output.finish_reason == "stop" and output.text == free.text[: free.text.index(free.text[-2:])]


def test_what_stopped_it_and_text_with_the_stop_string(engine: InferenceEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    free = engine.generate("Once", params, progress=False)[0]
    stop, token = free.text[5:9], free.token_ids[2]
    cases: list[tuple[dict[str, Any], str | int | None, str]] = [
        ({"stop": ["never there", stop]}, stop, free.text[: free.text.index(stop)]),
        ({"stop": stop, "include_stop_str_in_output": True}, stop, free.text[: free.text.index(stop) + len(stop)]),
        ({"stop_token_ids": [token]}, token, engine.tokenizer.decode(free.token_ids[:3], skip_special_tokens=True)),
        ({"eos_token_ids": [token], "ignore_eos": False}, None, engine.tokenizer.decode(free.token_ids[:3])),
        ({}, None, free.text),
    ]
    values = [params.model_copy(update=given) for given, _, _ in cases]
    outputs = engine.generate(["Once"] * len(cases), values, progress=False)
    for output, (_, reason, text) in zip(outputs, cases, strict=True):
        assert (output.outputs[0].stop_reason, output.text) == (reason, text)
    assert [output.finish_reason for output in outputs] == ["stop"] * 4 + ["length"]


def test_long_prompts_are_cut_on_request(engine: InferenceEngine) -> None:
    prompt = [(7 * i) % 1000 for i in range(200)]  # and max_model_len is 128
    for values, kept in ({"truncate_prompt_tokens": 20}, 20), ({"truncate_prompt_tokens": -1}, 122):
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, **values)
        output, plain = engine.generate([prompt, prompt[-kept:]], [params, GREEDY], progress=False)
        assert output.prompt_token_ids == tuple(prompt[-kept:])
        assert output.token_ids == plain.token_ids and len(output.token_ids) == 6
    with pytest.raises(ValueError, match="truncate_prompt_tokens would keep its end"):
        engine.generate(prompt, GREEDY, progress=False)


def test_texts_are_scored_and_continued(engine: InferenceEngine, tokenizer: Any) -> None:
    text, more = "Once upon", " a time"
    ids, after = tokenizer.encode(text), tokenizer.encode(more)
    whole, continued = engine.score(text + more, progress=False), engine.score(text, more, progress=False)
    assert whole[0].token_ids == continued[0].token_ids == (*ids, *after)
    expected = sum(token.logprob for token in whole[0].logprobs[-len(after) :])
    assert continued[0].logprob == pytest.approx(expected, abs=1e-4) and len(continued[0].logprobs) == len(after)
    with pytest.raises(ValueError, match=r"texts\[1\]: prompt: the tokenizer cannot encode the text"):
        engine.embed(["fine", "\ud800"], progress=False)


def test_text_can_be_left_out(engine: InferenceEngine) -> None:
    output = engine.generate("Once", GREEDY.model_copy(update={"detokenize": False}), progress=False)[0]
    assert output.text == "" and len(output.token_ids) == 6


def test_texts_that_cannot_be_tokenised(engine: InferenceEngine) -> None:
    surrogate = "prompt: the tokenizer cannot encode the text: UnicodeEncodeError: 'utf-8' codec can't encode"
    template = "prompt: the chat template fails on these messages: "
    chat = [{"role": "user"}]
    for prompts, start in (
        (["a \ud800"], surrogate),
        (["fine", "a \ud800"], f"prompts[1]: {surrogate}"),
        ([{"role": "user", "content": "\udfff"}], surrogate),
        (chat, template),
        ([[1], chat], f"prompts[1]: {template}"),
    ):
        with pytest.raises(ValueError) as error:
            engine.generate(prompts, progress=False)
        assert str(error.value).startswith(start) and "\n" not in str(error.value)
        assert not engine.has_unfinished()


def test_errors_that_are_made_in_another_way_are_named_with_their_prompt(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        "\ud800".encode()

    monkeypatch.setattr("meshlm.engine.prompts.as_sampling_params", fails)
    with pytest.raises(ValueError, match=r"^prompts\[0\]: 'utf-8' codec"):
        engine.generate([[1], [2]], progress=False)


def test_memory_before_loading_is_what_is_held_not_what_once_was(model: LlamaForCausalLM) -> None:
    torch.ones(64 << 20, dtype=torch.uint8)  # let go again
    with InferenceEngine(model, CONFIG) as engine:
        (rank,) = engine.ranks
    assert 0 < rank.baseline_rss_bytes < rank.peak_rss_bytes - (16 << 20)


def test_outputs_tell_their_story(engine: InferenceEngine, tokenizer: Any) -> None:
    prompt = [50 + i for i in range(17)]
    first, second = (engine.generate(prompt, GREEDY, progress=False)[0] for _ in range(2))
    assert (first.num_prompt_tokens, first.num_cached_tokens, second.num_cached_tokens) == (17, 0, 16)
    assert first.token_ids == second.token_ids
    assert first.text == tokenizer.decode(first.token_ids, skip_special_tokens=True)
    assert first.outputs[0].index == 0 and first.outputs[0].token_ids == first.token_ids
    times = first.timings
    assert times.queue_s is not None and times.ttft_s is not None and times.tpot_s is not None
    assert 0 <= times.queue_s <= times.ttft_s == times.token_s[0] <= times.total_s
    assert len(times.token_s) == 6 and list(times.token_s) == sorted(times.token_s)


def test_outputs_have_all_their_fields(engine: InferenceEngine) -> None:
    [output] = engine.generate(["the moon"], {"max_tokens": 2}, progress=False)
    for made in (output, output.timings, output.outputs[0]):
        assert vars(made).keys() == {field.name for field in fields(made)}
        assert replace(made) == made


def test_sampling_depends_on_the_seed_and_not_on_the_company(engine: InferenceEngine) -> None:
    def run(prompts: Any, **values: Any) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=1.5, max_tokens=8, ignore_eos=True, **values)
        return ids(engine.generate(prompts, params, progress=False))

    (alone,) = run([1, 2, 3], seed=5)
    assert run([[1, 2, 3], [4, 5], [1, 2, 3]], seed=5)[::2] == [alone, alone]
    assert run([1, 2, 3], seed=6) != [alone]
    assert run([1, 2, 3], seed=5, top_k=49152) == [alone]
    unseeded = run([[1, 2, 3]] * 4)
    assert len(set(unseeded)) == 4, "requests that bring no seed differ"


def test_the_engine_s_seed_repeats_a_run(model: LlamaForCausalLM) -> None:
    runs = []
    for seed in (1, 1, 2):
        with InferenceEngine(model, CONFIG.replace(seed=seed)) as engine:
            runs.append(ids(engine.generate([[1, 2]] * 3, {"temperature": 1.0, "max_tokens": 6}, progress=False)))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("progress", [False, True])
def test_the_progress_bar_can_be_turned_off(
    engine: InferenceEngine, progress: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    engine.generate([1], GREEDY, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("1/1" in err) == progress == ("Generating" in err)


# ---- stream ---------------------------------------------------------------------------------------------------------


def test_deltas_make_the_text(engine: InferenceEngine) -> None:
    prompts = ["Once upon a time", "Hello", [5, 6]]
    expected = engine.generate(prompts, GREEDY, progress=False)
    texts, last = ["", "", ""], {}
    for output in engine.stream(prompts, GREEDY):
        texts[output.index] += output.delta
        assert output.text == texts[output.index]
        assert not last.get(output.index, output).finished or last.get(output.index) is None
        last[output.index] = output
    assert texts == [output.text for output in expected]
    assert [last[i].token_ids for i in range(3)] == ids(expected)
    assert all(output.finished for output in last.values())


def test_leaving_a_stream_aborts_it(engine: InferenceEngine) -> None:
    for output in engine.stream([[1, 2], [3, 4]], SamplingParams(max_tokens=100, ignore_eos=True)):
        assert not output.finished
        break
    gc.collect()
    assert not engine.has_unfinished()
    assert len(engine.generate([1, 2], GREEDY, progress=False)[0].token_ids) == 6


def test_streams_can_take_turns(engine: InferenceEngine) -> None:
    a, b = (engine.generate(prompt, GREEDY, progress=False)[0].token_ids for prompt in ([1, 2], [3, 4]))
    streams = engine.stream([1, 2], GREEDY), engine.stream([3, 4], GREEDY)
    pairs = list(zip(*streams, strict=True))
    assert (pairs[-1][0].token_ids, pairs[-1][1].token_ids) == (a, b)
    assert len(pairs) == 6, "each has seen all of its own"


def test_other_calls_within_a_stream(engine: InferenceEngine) -> None:
    expected = engine.generate([[1, 2], [3, 4], [5, 6]], GREEDY, progress=False)
    stream = engine.stream([1, 2], GREEDY)
    seen = [next(stream)]
    assert engine.generate([3, 4], GREEDY, progress=False)[0].token_ids == expected[1].token_ids
    request_id = engine.add_request([5, 6], GREEDY)
    stepped: list[RequestOutput] = []
    while engine.has_unfinished():
        stepped += engine.step()
    assert {output.request_id for output in stepped} == {request_id}
    assert stepped[-1].token_ids == expected[2].token_ids
    seen += stream
    assert [len(output.token_ids) for output in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].token_ids == expected[0].token_ids


def test_leaving_a_stream_loses_nobody_else_s_outputs(engine: InferenceEngine) -> None:
    first, stream = engine.add_request([1], {"max_tokens": 1}), engine.stream([2], {"max_tokens": 9})
    next(stream)
    later = engine.add_request([3], {"max_tokens": 1})
    next(stream)
    stream.close()
    outputs = engine.step()
    assert [(output.request_id, output.finished) for output in outputs] == [(first, True), (later, True)]


# ---- add_request, step, abort ---------------------------------------------------------------------------------------


def test_step_by_step(engine: InferenceEngine) -> None:
    expected = ids(engine.generate([[1, 2], [3, 4]], GREEDY, progress=False))
    one = engine.add_request([1, 2], GREEDY)
    assert engine.has_unfinished()
    seen = {one: engine.step()}
    two = engine.add_request([3, 4], GREEDY, request_id="two")
    assert two == "two" and one != two
    seen[two] = []
    while engine.has_unfinished():
        for output in engine.step():
            seen[output.request_id].append(output)
    assert [seen[one][-1].token_ids, seen[two][-1].token_ids] == expected
    assert [len(output.token_ids) for output in seen[one]] == [1, 2, 3, 4, 5, 6]
    assert [len(output.timings.token_s) for output in seen[one]] == [1, 2, 3, 4, 5, 6]
    assert "".join(output.delta for output in seen[two]) == seen[two][-1].text
    assert engine.step() == []


def test_own_ids_do_not_collide_with_given_ones(engine: InferenceEngine) -> None:
    number = int(engine.add_request([1], GREEDY).removeprefix("request-"))
    taken = [engine.add_request([2], GREEDY, request_id=f"request-{number + i}") for i in (1, 2, 3)]
    own = engine.add_request([3], GREEDY)
    assert own not in taken
    while engine.has_unfinished():
        engine.step()


def test_abort(engine: InferenceEngine) -> None:
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    started = engine.add_request("Once", long)
    engine.step()
    engine.step()
    waiting = engine.add_request([3, 4], long)
    assert engine.abort(started) and engine.abort(waiting)
    assert not engine.abort(started), "it has ended"
    assert not engine.abort("never heard of it")
    outputs = {output.request_id: output for output in engine.step()}
    assert {output.finish_reason for output in outputs.values()} == {"abort"}
    assert (len(outputs[started].token_ids), len(outputs[waiting].token_ids)) == (2, 0)
    assert outputs[waiting].timings.queue_s is None and outputs[waiting].timings.ttft_s is None


def test_abort_ends_a_stream(engine: InferenceEngine) -> None:
    seen = []
    for output in engine.stream(
        [1, 2],
        SamplingParams(max_tokens=100, ignore_eos=True),
    ):
        seen.append(output)
        if len(seen) == 3:
            assert engine.abort(output.request_id)
    assert (seen[-1].finish_reason, len(seen[-1].token_ids), len(seen)) == ("abort", 3, 4)


def test_ctrl_c_comes_between_steps(engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds nothing half done, and the outputs of the step that it came in are not lost."""
    request_id = engine.add_request([1, 2], {"max_tokens": 1})
    step, done = engine._core.step, []

    def interrupted() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        moved = step()
        done.append(True)
        return moved

    monkeypatch.setattr(engine._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert [(output.request_id, output.finished) for output in engine.step()] == [(request_id, True)]

    monkeypatch.setattr(engine._core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2], [3]], SamplingParams(max_tokens=50), progress=False)
    monkeypatch.undo()
    assert not engine.has_unfinished(), "generate's own requests are aborted"


# ---- the engine itself ----------------------------------------------------------------------------------------------


def test_stats_and_descriptions(model: LlamaForCausalLM, tokenizer: Any) -> None:
    with InferenceEngine(model, CONFIG, tokenizer) as engine:
        prompt = [50 + i for i in range(9)]
        for _ in range(2):
            engine.generate(prompt, GREEDY, progress=False)
        (replica,) = engine.stats().replicas
        assert (replica.num_prompt_tokens, replica.num_cached_tokens, replica.num_output_tokens) == (18, 8, 12)
        assert (engine.stats().num_cached_tokens, engine.stats().num_output_tokens) == (8, 12)
        assert (replica.num_steps, replica.num_preemptions, engine.stats().num_preemptions) == (12, 0, 0)
        text = engine.describe()
        first = text.splitlines()[0]
        assert first.startswith(
            "LlamaForCausalLM (hand-written policy) on dp=1 × pp=1 × tp=1, float32, max_model_len 128; KV cache"
        )
        assert "64 blocks of 4 tokens" in first
        assert "eager" in text and "layers" in text and "num_kv_blocks" in text and "constructor" in text
        (busy,) = engine.busy()
        assert busy["steps"] == 12 and busy["busy_s"] > 0
        (rank,) = engine.ranks
        assert (rank.layers, rank.query_heads, rank.kv_heads, rank.vocabulary) == ((0, 2), (0, 9), (0, 3), (0, 49152))


def test_preemption_is_counted_and_changes_nothing(model: LlamaForCausalLM) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(0, 60, 10)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with InferenceEngine(model, CONFIG) as roomy:
        expected = ids(roomy.generate(prompts, params, progress=False))
        assert roomy.stats().num_preemptions == 0
    small = CONFIG.replace(num_kv_blocks=12, max_model_len=40)
    with InferenceEngine(model, small) as engine:
        assert ids(engine.generate(prompts, params, progress=False)) == expected
        assert engine.stats().num_preemptions > 0
        engine.check()


def test_closing(model: LlamaForCausalLM) -> None:
    before = psutil.Process().children(recursive=True)
    with InferenceEngine(model, CONFIG) as engine:
        assert psutil.Process().children(recursive=True) == before, "a world of one rank needs no other process"
        assert not torch.distributed.is_initialized()
    engine.close()
    engine.close()
    for call in (
        lambda: engine.generate([1], GREEDY),
        lambda: engine.stream([1], GREEDY),
        lambda: engine.add_request([1]),
        engine.step,
        lambda: engine.abort("x"),
        engine.has_unfinished,
        engine.stats,
    ):
        with pytest.raises(RuntimeError, match=r"^the engine is closed; make a new InferenceEngine$"):
            call()


@pytest.mark.parametrize("policy", ["auto", "generic"])
def test_a_closed_engine_lets_go_of_its_weights(model: LlamaForCausalLM, policy: str) -> None:
    engine = InferenceEngine(model, CONFIG.replace(policy=policy))
    engine.generate([1], GREEDY, progress=False)
    stage = engine._world.executor.worker.stage  # type: ignore[attr-defined]
    parts = [weakref.ref(module) for module in stage.modules()]
    del stage
    gc.disable()
    try:
        engine.close()
        assert not [module for part in parts if (module := part()) is not None]
    finally:
        gc.enable()
    assert len(model.generate(torch.tensor([[1]]), max_new_tokens=2, min_new_tokens=2)[0]) == 3  # the caller's stands


def test_two_engines_side_by_side(model: LlamaForCausalLM, engine: InferenceEngine) -> None:
    with InferenceEngine(model, CONFIG.replace(block_size=16)) as other:
        assert ids(other.generate([1, 2], GREEDY, progress=False)) == ids(
            engine.generate([1, 2], GREEDY, progress=False)
        )


def test_a_directory_brings_its_tokenizer_and_its_defaults(
    model: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with InferenceEngine(tmp_path, CONFIG) as engine:
        assert engine.tokenizer is None
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.6, top_k=7, eos_token_id=[2, 3]).save_pretrained(tmp_path)
    with InferenceEngine(tmp_path, CONFIG) as engine:
        defaults = engine._preparer.defaults
        assert (defaults.temperature, defaults.top_k, defaults.eos_token_ids) == (0.6, 7, (2, 3))
        assert isinstance(engine.generate("Hello", {"max_tokens": 2}, progress=False)[0].text, str)
