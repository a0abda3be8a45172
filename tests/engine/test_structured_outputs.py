"""Structured output through the engine: the same tokens on every mesh and however they are scheduled, and valid.

A tiny random model with the demo model's tokenizer: any token is about as likely as any other, so what comes out is the
grammar's doing. What one rank gives in plain steps is what all others must give.
"""

import itertools
import json
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pydantic import BaseModel, Field
from schemas import a_whole_schema, check_json

from meshlm import InferenceConfig, InferenceEngine, RequestOutput, StructuredOutputsParams
from meshlm.engine import structured
from tiny import make_llama

VOCAB_SIZE = 49_152 + 5  # an LM head that is padded; its shards begin within a byte of a mask
END = 2
COMMON: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "block_size": 4,
    "num_kv_blocks": 1024,
    "max_num_batched_tokens": 256,
}


@pytest.fixture(scope="module")
def tiny(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("structured") / "tiny"
    make_llama(1, vocab_size=VOCAB_SIZE, max_position_embeddings=1024, eos_token_id=END).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model / name, folder / name)
    return folder


@contextmanager
def running(model: Path, **values: Any) -> Iterator[InferenceEngine]:
    with InferenceEngine(model, InferenceConfig(**{**COMMON, **values})) as engine:
        yield engine
        engine.check()


@pytest.fixture(scope="module")
def local(tiny: Path) -> Iterator[InferenceEngine]:
    with running(tiny) as engine:
        yield engine


# ---- requests ----------------------------------------------------------------------------------------------------


class Animal(BaseModel):
    name: str = Field(max_length=6)
    legs: int = Field(ge=0, le=99)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["é", "two words", None]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
    },
    "required": ["kind", "numbers"],
    "additionalProperties": False,
}
LARK = 'start: "(" start ")" | NAME\nNAME: /[a-z]{2,9}/'
GBNF = 'root ::= term ("+" term){1,4}\nterm ::= [0-9]{1,3} | "(" root ")"'
CHOICES = ("yes", "no", "yes and no", "naïve 😀")


def json_with(schema: dict[str, Any]) -> Callable[[str], None]:
    return lambda text: jsonschema.validate(json.loads(text), schema)


def matching(regex: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(regex, text), text

    return check


@dataclass(frozen=True)
class Asked:
    """A request, and what its finished outputs must fulfil."""

    params: dict[str, Any]
    check: Callable[[str], None] = field(compare=False, default=lambda text: None)
    num_prompt_tokens: int = 5
    prompt_like: str | None = None  # whose prompt it has


SAMPLED = {"temperature": 1.0}
ASKED = {
    "schema": Asked({"json": SCHEMA}, json_with(SCHEMA)),
    "schema as text": Asked({"json": json.dumps(SCHEMA), **SAMPLED}, json_with(SCHEMA)),
    "pydantic": Asked({"json": Animal, **SAMPLED}, json_with(Animal.model_json_schema()), num_prompt_tokens=70),
    "regex": Asked({"regex": r"\d{3}-[a-zé]{2,12}"}, matching(r"\d{3}-[a-zé]{2,12}")),
    "regex, hot": Asked({"regex": "(ab|cd){2,9}", "temperature": 5.0}, matching("(ab|cd){2,9}")),
    "choice": Asked({"choice": CHOICES, **SAMPLED}, lambda text: CHOICES.index(text) and None),
    "lark": Asked({"grammar": LARK, **SAMPLED}, matching(r"\(*[a-z]{2,9}\)*")),
    "gbnf": Asked({"grammar": GBNF, **SAMPLED}, matching(r"[\d+()]+")),
    "object": Asked({"json_object": True, **SAMPLED}, json_with({"type": "object"})),
    "no grammar": Asked({}),
    "no grammar, sampled": Asked({**SAMPLED, "top_p": 0.9}, num_prompt_tokens=40),
    "penalties": Asked(
        {"regex": "[abc ]{9}!", "repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": 1.0},
        matching("[abc ]{9}!"),
    ),
    "bans": Asked(
        {"regex": "[abcd]{8}", "no_repeat_ngram_size": 1, "bad_words": ["b"], "logit_bias": {80: -50.0}},
        matching("[abcd]{8}"),
    ),
    "top 1": Asked({"json": SCHEMA, "temperature": 0.7, "top_k": 1}, json_with(SCHEMA), prompt_like="schema"),
    "top p": Asked({"json": SCHEMA, "temperature": 0.7, "top_p": 0.05}, json_with(SCHEMA)),
    "min p": Asked({"json": SCHEMA, "temperature": 3.0, "min_p": 0.6, "top_k": 3}, json_with(SCHEMA)),
    "stop ids": Asked({"regex": "[a-z]+", "stop_token_ids": [81], **SAMPLED}, matching("[a-z]+")),
    "no end token": Asked({"json": SCHEMA, "ignore_eos": True, **SAMPLED}, json_with(SCHEMA)),
    "logprobs": Asked({"choice": CHOICES, "logprobs": 3, **SAMPLED}, lambda text: CHOICES.index(text) and None),
    "three": Asked({"json": SCHEMA, "n": 3, **SAMPLED}, json_with(SCHEMA), num_prompt_tokens=7),
    "best of three": Asked({"regex": "[0-9]{4}", "best_of": 3, **SAMPLED}, matching("[0-9]{4}")),
}
KINDS = ("json", "regex", "choice", "grammar", "json_object")


def params_of(name: str) -> dict[str, Any]:
    given = ASKED[name].params
    kind = {name: value for name, value in given.items() if name in KINDS}
    rest = {name: value for name, value in given.items() if name not in KINDS}
    number = list(ASKED).index(name)
    return {"max_tokens": 48, "temperature": 0.0, "seed": number, "structured_outputs": kind or None, **rest}


def prompt_of(name: str) -> list[int]:
    number = list(ASKED).index(ASKED[name].prompt_like or name)
    shared = [7, 8, 9, 10]  # in the cache from the first prompt on
    return [*shared, *((number * 97 + i * i) % 1000 + 100 for i in range(ASKED[name].num_prompt_tokens - 4))]


def ask(engine: InferenceEngine, names: Sequence[str] = tuple(ASKED)) -> dict[str, RequestOutput]:
    params = [params_of(name) for name in names]
    outputs = engine.generate([prompt_of(name) for name in names], params, progress=False)
    return dict(zip(names, outputs, strict=True))


Tokens = dict[str, list[tuple[tuple[int, ...], str | None]]]


def tokens_of(outputs: dict[str, RequestOutput]) -> Tokens:
    return {name: [(o.token_ids, o.finish_reason) for o in output.outputs] for name, output in outputs.items()}


@pytest.fixture(scope="module")
def plain(local: InferenceEngine) -> dict[str, RequestOutput]:
    """What one rank gives in plain steps."""
    return ask(local)


def test_finished_outputs_are_valid(plain: dict[str, RequestOutput]) -> None:
    finished = set()
    for name, output in plain.items():
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length"), completion.error
            if completion.finish_reason == "stop":
                finished.add(name)
                ASKED[name].check(completion.text)
            elif "structured_outputs" in params_of(name):
                assert len(completion.token_ids) == 48
    assert len(finished) > len(ASKED) - 6
    three = plain["three"].outputs
    assert len({completion.token_ids for completion in three}) == 3  # each follows the grammar on its own way
    assert plain["top 1"].token_ids == plain["schema"].token_ids  # of what the grammar allows, the likeliest
    assert [len(completion.logprobs or ()) for completion in plain["logprobs"].outputs] == [
        len(plain["logprobs"].token_ids)
    ]


def test_the_same_alone_again_and_streamed(local: InferenceEngine, plain: dict[str, RequestOutput]) -> None:
    """Again, with the prompt in the cache; streamed, what is new each time is the text together."""
    few = ("pydantic", "gbnf", "three", "penalties")
    expected = tokens_of({name: plain[name] for name in few})
    assert {name: tokens_of(ask(local, [name]))[name] for name in few} == expected
    assert ask(local, few)["pydantic"].num_cached_tokens > 60
    deltas, last = dict.fromkeys(few, ""), {}
    for output in local.stream([prompt_of(name) for name in few], [params_of(name) for name in few]):
        name = few[output.index]
        deltas[name] += output.delta
        last[name] = output
    assert tokens_of(last) == expected
    assert deltas == {name: plain[name].text for name in few}


@pytest.mark.parametrize(
    "values",
    [
        {"async_scheduling": True, "max_num_batched_tokens": 9, "num_kv_blocks": 44, "max_model_len": 160},
        pytest.param({"block_size": 1, "num_kv_blocks": 160, "enable_prefix_caching": False}, marks=pytest.mark.slow),
        pytest.param({"speculative": {"method": "suffix", "adaptive": False}}, marks=pytest.mark.slow),
        pytest.param({"speculative": "draft_model", "async_scheduling": False}, marks=pytest.mark.slow),
        pytest.param({"tp_size": 3, "speculative": "ngram"}, marks=pytest.mark.slow),
        pytest.param({"tp_size": 2, "pp_size": 2, "num_kv_blocks": 60}, marks=pytest.mark.slow),
        pytest.param({"tp_size": 2, "dp_size": 2, "async_scheduling": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_on_every_mesh(values: dict[str, Any], tiny: Path, plain: dict[str, RequestOutput]) -> None:
    if values.get("speculative") == "draft_model":  # itself, which is always right
        values = values | {"speculative": {"method": "draft_model", "model": tiny, "adaptive": False}}
    with running(tiny, **values) as engine:
        assert tokens_of(ask(engine)) == tokens_of(plain)
        if values.get("num_kv_blocks"):
            assert engine.stats().num_preemptions > 0
        guess(engine, plain, "half right")
        assert tokens_of(ask(engine, DRAFTED)) == tokens_of({name: plain[name] for name in DRAFTED})


# ---- drafts ------------------------------------------------------------------------------------------------------

DRAFTED = ("schema", "regex, hot", "lark", "bans", "no end token", "three", "no grammar")
QUALITIES = ("right", "wrong", "half right", "past the end")


class Guesser:
    """Drafts from what a request's outputs will be: all of it, none, every second token, or with an end and more."""

    def __init__(self, plain: dict[str, RequestOutput], quality: str) -> None:
        self.quality = quality
        self._outputs: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for output in plain.values():
            self._outputs[output.prompt_token_ids] = [completion.token_ids for completion in output.outputs]

    def propose(self, sequence: Sequence[int], most: int, batch_size: int) -> list[int]:
        done = tuple(sequence.output_token_ids)
        outputs = self._outputs[tuple(sequence.token_ids[: sequence.num_prompt_tokens])]
        coming = next((ids[len(done) :] for ids in outputs if ids[: len(done)] == done), (5, 6, 7))
        drafts = list(coming[:4])
        if self.quality == "wrong":
            drafts = [token_id + 1 for token_id in drafts]
        elif self.quality == "half right":
            drafts[2:3] = [END]
        elif self.quality == "past the end":
            drafts += [END, END, 300]
        return drafts[:most]

    def observe(self, sequence: Sequence[int], num_drafted: int, num_accepted: int) -> None: ...

    def observe_step(self, model: int, num_rows: int, seconds: float) -> None: ...

    def end(self, sequence: Sequence[int]) -> None: ...


def guess(engine: InferenceEngine, plain: dict[str, RequestOutput], quality: str | None) -> None:
    for replica in engine._core.replicas:
        replica.scheduler.speculator = quality and Guesser(plain, quality)


@pytest.mark.parametrize("quality", QUALITIES)
def test_drafts_are_cut_to_the_grammar(local: InferenceEngine, plain: dict[str, RequestOutput], quality: str) -> None:
    guess(local, plain, quality)
    try:
        outputs = ask(local, DRAFTED)
    finally:
        guess(local, plain, None)
    assert tokens_of(outputs) == tokens_of({name: plain[name] for name in DRAFTED})
    assert outputs["schema"].num_drafted == outputs["schema"].num_accepted  # no wrong guess happens to be JSON
    assert (outputs["schema"].num_drafted > 3) == (quality != "wrong")


# ---- what fails, fails alone ------------------------------------------------------------------------------------

BAD_SCHEMA = {"structured_outputs": {"json": {"type": "x"}}}
BAD_LINE = 'StructuredOutputsParams.json: \'{"type": "x"}\' is not valid: Invalid type: x'
OTHERS = ("regex", "no grammar", "schema")
PROMPT = [5, 6, 7]


def assert_failed(output: RequestOutput, error: str) -> None:
    assert output.finished and output.finish_reason == "error" and output.text == ""
    assert re.fullmatch(error, output.error or "") and {o.error for o in output.outputs} == {output.error}


@pytest.mark.parametrize("way", ["generate", "stream", "step", "alone"])
def test_a_schema_that_cannot_be_compiled(local: InferenceEngine, plain: dict[str, RequestOutput], way: str) -> None:
    """The same in every call, with others or alone: the request's output says so, and nothing is raised."""
    bad, num_others = BAD_SCHEMA | {"n": 2, "temperature": 1.0}, 0 if way == "alone" else len(OTHERS)
    prompts = [PROMPT, *(prompt_of(name) for name in OTHERS)][: 1 + num_others]
    params = [bad, *(params_of(name) for name in OTHERS)][: 1 + num_others]
    if way in ("generate", "alone"):
        outputs = local.generate(prompts, params, progress=False)
    elif way == "stream":
        last = {output.index: output for output in local.stream(prompts, params)}
        outputs = [last[index] for index in range(len(prompts))]
    else:
        ids = [local.add_request(*request) for request in zip(prompts, params, strict=True)]
        finished = step_until_done(local)
        outputs = [finished[request_id] for request_id in ids]
    assert_failed(outputs[0], re.escape(BAD_LINE))
    assert len(outputs[0].outputs) == 2 and outputs[0].token_ids == ()
    failure = local._grammars.submit(StructuredOutputsParams(**BAD_SCHEMA["structured_outputs"])).exception()
    assert failure is not None and failure.__traceback__ is None  # it is kept, and must keep no request
    others = dict(zip(OTHERS, outputs[1:], strict=False))
    assert tokens_of(others) == tokens_of({name: plain[name] for name in others})
    assert not local.has_unfinished()


def step_until_done(engine: InferenceEngine) -> dict[str, RequestOutput]:
    finished: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return finished


def test_mistakes_that_are_seen_at_once_are_raised(local: InferenceEngine, tiny: Path) -> None:
    for given, error in [
        ({"regex": "a", "choice": ["a"]}, "exactly one of json, .* must be given, not regex and choice"),
        ({}, "exactly one of .* must be given, not none"),
        ({"json": "{"}, r"prompts\[1\]: .*StructuredOutputsParams.json: '{' is not valid: must be JSON"),
        ({"schema": {}}, "structured_outputs: .*schema"),
        ("a+", "structured_outputs: .*must be StructuredOutputsParams, a dict of its fields or None, not str"),
    ]:
        with pytest.raises(ValueError, match=error):
            local.generate([PROMPT, PROMPT], [None, {"structured_outputs": given}], progress=False)
    assert not local.has_unfinished()


def likeliest_first(past: Sequence[int], output: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """Heeds no mask: the first token is the likeliest."""
    return -torch.arange(len(logits), dtype=logits.dtype)


NONE_LEFT = "no token is left to be drawn: what .* structured_outputs allow, other settings ban"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"regex": "Q", "stop_token_ids": [65]}, "structured output cannot go on: no token of the vocabulary, .*"),
        ({"regex": "[ab]{3}", "allowed_token_ids": [99, 100]}, NONE_LEFT),
        ({"regex": "Q", "suppress_tokens": [65]}, NONE_LEFT),
        ({"choice": ["a"], "logits_processors": [likeliest_first]}, "structured_outputs: token 0 was drawn, .*"),
    ],
)
def test_settings_that_contradict_a_grammar(local: InferenceEngine, given: dict[str, Any], error: str) -> None:
    kind = {name: value for name, value in given.items() if name in KINDS}
    rest = {name: value for name, value in given.items() if name not in KINDS}
    bad, good = local.generate(
        [PROMPT, PROMPT], [{"structured_outputs": kind, **rest}, {"structured_outputs": kind}], progress=False
    )
    assert bad.finish_reason == "error" and re.fullmatch(error, bad.error or "")
    assert good.finish_reason == "stop" and re.fullmatch("Q|[ab]{3}|a", good.text)


# ---- while a grammar is compiled ---------------------------------------------------------------------------------


@dataclass
class Slow:
    """A grammar that compiles when it is told to: `params` of requests that want it."""

    params: dict[str, Any]
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    regex = f"slow{next(NUMBERS)}"  # what was compiled before is kept
    slow, grammar_of = Slow({"structured_outputs": {"regex": regex}}), structured.grammar_of

    def wait(params: Any) -> str:
        if params.regex == regex:
            slow.begun.set()
            slow.go_on.wait()
        return grammar_of(params)

    monkeypatch.setattr(structured, "grammar_of", wait)
    yield slow
    slow.go_on.set()


NUMBERS = itertools.count()


def test_others_go_on_meanwhile(local: InferenceEngine, plain: dict[str, RequestOutput], slow: Slow) -> None:
    waiting = local.add_request(PROMPT, slow.params)
    assert tokens_of(ask(local, OTHERS)) == tokens_of({name: plain[name] for name in OTHERS})
    assert slow.begun.is_set() and local.has_unfinished()
    assert local.step() == []  # in a moment: there is nothing to do but to wait
    slow.go_on.set()
    output = step_until_done(local)[waiting]
    assert output.finish_reason == "stop" and output.text.startswith("slow")


def test_abort_meanwhile(local: InferenceEngine, slow: Slow) -> None:
    aborted = local.add_request(PROMPT, slow.params | {"n": 2, "temperature": 1.0})
    assert slow.begun.wait(30) and local.step() == []
    assert local.abort(aborted) and not local.abort(aborted) and local.has_unfinished()
    (output,) = local.step()
    assert [completion.finish_reason for completion in output.outputs] == ["abort", "abort"]
    assert not local.has_unfinished()


def test_ctrl_c_meanwhile(local: InferenceEngine, slow: Slow) -> None:
    def interrupt() -> None:
        slow.begun.wait(30)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        local.generate(PROMPT, slow.params, progress=False)
    thread.join()
    assert not local.has_unfinished()
    local.check()


def test_close_meanwhile(tiny: Path, slow: Slow) -> None:
    """The call that waits ends, as every call does whose engine is closed; the compilation goes on for itself."""
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON))

    def close() -> None:
        slow.begun.wait(30)
        engine.close()

    thread = threading.Thread(target=close)
    thread.start()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([PROMPT, PROMPT], [slow.params, None], progress=False)
    thread.join()


# ---- torchrun ----------------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, sys, time
from meshlm import InferenceConfig, InferenceEngine
from meshlm.engine import structured

task = json.loads(open(sys.argv[1] + "/task.json").read())
grammar_of = structured.grammar_of
structured.grammar_of = lambda params: time.sleep(1) or grammar_of(params)  # on whichever rank compiles
prompts, params, report = task["prompts"], task["params"], []
with InferenceEngine(task["model"], InferenceConfig(**task["config"])) as engine:
    def tell(outputs):
        report.append([[output.token_ids, output.finish_reason, output.error] for output in outputs])
    tell(engine.generate(prompts, params, progress=False))
    tell(engine.generate(prompts[:1], params[:1], progress=False))
    tell(output for output in engine.stream(prompts, params) if output.finished)
    ids = [engine.add_request(*request) for request in zip(prompts, params)]
    engine.abort(ids[-1])
    while engine.has_unfinished():
        tell(engine.step())
    engine.add_request(prompts[1], {"structured_outputs": {"regex": "never waited for"}})
    engine.check()
open(sys.argv[1] + f"/rank{os.environ['RANK']}.json", "w").write(json.dumps(report))
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path, tiny: Path, plain: dict[str, RequestOutput], torchrun: Any) -> None:
    """Every rank returns the same; none hangs over a grammar that fails, or that nobody waits for any more."""
    names = ("schema", "no grammar", "regex")
    task = {
        "model": str(tiny),
        "config": {**COMMON, "tp_size": 2},
        "prompts": [PROMPT, *map(prompt_of, names)],
        "params": [BAD_SCHEMA, *map(params_of, names)],
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "script.py").write_text(SCRIPT)
    with torchrun(2, tmp_path / "script.py", str(tmp_path)) as agent:
        out, err = agent.communicate(timeout=200)
    assert agent.returncode == 0, out + err
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    generated = first[0]
    assert generated[0] == first[1][0] == [[], "error", BAD_LINE]
    assert [tuple(token_ids) for token_ids, _, _ in generated[1:]] == [plain[name].token_ids for name in names]
    assert sorted(first[2]) == sorted(generated)


# ---- tokenizers --------------------------------------------------------------------------------------------------


class SlowTokenizer:
    """One that is not the tokenizers library's."""

    eos_token_id, all_special_ids = END, (END,)

    def __len__(self) -> int:
        return 101

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, token_ids))

    def convert_ids_to_tokens(self, token_ids: Sequence[int], **options: Any) -> list[str]:
        return [str(token_id) for token_id in token_ids]


def test_an_engine_whose_tokenizer_will_not_do() -> None:
    config = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=64)
    asked = {"structured_outputs": {"regex": "a"}, "detokenize": False}
    error = "structured_outputs need a tokenizer, and the engine has none"
    with InferenceEngine(make_llama(), config) as engine, pytest.raises(ValueError, match=error):
        engine.generate(PROMPT, asked, progress=False)
    with InferenceEngine(make_llama(), config, tokenizer=SlowTokenizer()) as engine:
        bad, good = engine.generate([PROMPT, PROMPT], [asked, {"detokenize": False, "max_tokens": 3}], progress=False)
        assert_failed(bad, r"structured output does not work with this tokenizer \(SlowTokenizer\): .*")
        assert len(good.token_ids) == 3


# ---- schemas at random -------------------------------------------------------------------------------------------


def test_every_finished_output_validates(local: InferenceEngine) -> None:
    """Of 200 schemas, in batches as large as the cache allows. What closes a document is made likelier."""
    rng = random.Random(0)
    schemas = [a_whole_schema(rng) for _ in range(200)]
    closing = {'"': 8, "}": 8, "]": 8, '"}': 3, '"]': 3, ",": 4}
    bias = {local.tokenizer.encode(text)[0]: float(value) for text, value in closing.items()}
    outputs = local.generate(
        [[5, 6, 100 + number] for number in range(len(schemas))],
        [{"structured_outputs": {"json": schema}, "max_tokens": 120, "logit_bias": bias} for schema in schemas],
        progress=False,
    )
    finished = [
        (output, schema) for output, schema in zip(outputs, schemas, strict=True) if output.finish_reason == "stop"
    ]
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert len(finished) > 150 and len({output.text for output, _ in finished}) > 100
    for output, schema in finished:
        check_json(output.text, schema)


# ---- the real model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_model(demo_model: Path) -> None:
    """Greedy and sampled, with drafts and without, on one rank and two: what it says, and not only its form."""
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Spain"]}},
        "required": ["capital", "country"],
        "additionalProperties": False,
    }
    prompt = [{"role": "user", "content": "What is the capital of France? Answer in JSON: capital, country."}]
    params = [
        {"structured_outputs": {"json": schema}, "max_tokens": 60, "temperature": 0.0},
        {"structured_outputs": {"json": schema}, "max_tokens": 60, "temperature": 0.8, "seed": 3},
        {"structured_outputs": {"choice": ["London", "Paris"]}, "temperature": 0.0},
        {"structured_outputs": {"regex": r"(The|A) [a-z]+ [^.]{1,60}\."}, "max_tokens": 60, "temperature": 0.0},
    ]
    found = []
    for values in ({}, {"tp_size": 2, "speculative": "ngram"}):
        with running(demo_model, num_kv_blocks=256, block_size=16, **values) as engine:
            outputs = engine.generate([prompt] * len(params), params, progress=False)
        found.append([output.token_ids for output in outputs])
        for output in outputs[:2]:
            assert output.finish_reason == "stop"
            check_json(output.text, schema)
        assert json.loads(outputs[0].text) == {"capital": "Paris", "country": "France"}
        assert outputs[2].text == "Paris"
        assert re.fullmatch(r"(The|A) [a-z]+ [^.]{1,60}\.", outputs[3].text)
    assert found[0] == found[1]
