"""Grammars, matchers and masks of structured output, with the demo model's tokenizer."""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel
from schemas import a_whole_schema, check_json
from transformers import AutoTokenizer

from meshlm.config import ConfigError, StructuredOutputsParams
from meshlm.engine import structured
from meshlm.engine.structured import GrammarCompiler, Matcher

VOCAB = 49152 + 40  # an LM head that is padded, to no multiple of 32
END = 2
CUSTOM_END = 5  # a special token that is not the model's end token


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    yield compiler
    compiler.close()


MakeMatcher = Callable[..., Matcher]


@pytest.fixture(scope="module")
def make(compiler: GrammarCompiler) -> MakeMatcher:
    """make(field=value, …): a matcher that heeds the end token."""

    def make(end_token_ids: tuple[int, ...] = (END,), **values: Any) -> Matcher:
        return compiler.submit(StructuredOutputsParams(**values)).result().matcher(end_token_ids)

    return make


def new_mask(*rows: int) -> np.ndarray:
    return np.zeros((*rows, (VOCAB + 31) // 32), np.int32)


def allowed(mask: np.ndarray) -> np.ndarray:
    """The ids of a mask's tokens, ascending."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def next_tokens(matcher: Matcher) -> set[int]:
    mask = new_mask()
    matcher.fill(mask)
    return set(allowed(mask).tolist())


def follow(matcher: Matcher, token_ids: list[int]) -> bool:
    """Whether the matcher takes all of them; its masks must say the same beforehand."""
    for token_id in token_ids:
        in_mask = token_id in next_tokens(matcher)
        assert matcher.accept(token_id) == in_mask
        if not in_mask:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------
# which texts are sentences


class Animal(BaseModel):
    name: str
    legs: int


GBNF = r"""
# arithmetic, over lines
root ::= start
start ::= term ("+" term)* # a rule with the name of Lark's first
term ::= [0-9]+
  | "(" start ")"
  | "\u00e9" | "\x41"
"""
CHOICES = ["a", "ab", "naïve 😀\n\x7f", '"quo\\te" .*+']
LARK = 'start: "(" start ")" | NAME\nNAME: /[a-z]+/'


@pytest.mark.parametrize(
    ("values", "sentences", "others"),
    [
        ({"json": Animal}, ['{"name":"é 😀","legs":4}', '{"name": "x", "legs": -3}'], ['{"name":"x"}', "4"]),
        ({"json": {"type": "object"}}, ["{}", '{"a": [1, null]}'], ["[]", "{} "]),
        ({"json": {"enum": ["日本", 3]}}, ['"日本"', "3"], ['"日"', "4"]),
        ({"json": {"exclusiveMinimum": 0, "maximum": 0.5, "type": "number"}}, ["0.25", "0.5"], ["0", "0.0", "0.6"]),
        ({"json": {"items": {"minimum": -0.5, "exclusiveMaximum": 0, "type": "number"}}}, ["[-0.5]"], ["[-0]", "[0]"]),
        ({"json": {"exclusiveMinimum": 3, "exclusiveMaximum": 3.5, "minimum": 1, "type": "number"}}, ["3.2"], ["3"]),
        ({"json": {"exclusiveMinimum": 0, "minimum": 0.2, "maximum": 0.5, "type": "number"}}, ["0.2"], ["0", "0.1"]),
        ({"json": {"const": {"exclusiveMinimum": 0, "maximum": 0.5}}}, ['{"exclusiveMinimum":0,"maximum":0.5}'], []),
        ({"json_object": True}, ["{}", '{"a": "\\n"}'], ["[]", "1"]),
        ({"regex": r"\d{3}-[äöü]+"}, ["123-ä", "000-üö"], ["12-ä", "123-", "123-a"]),
        ({"regex": "^(yes|no)$"}, ["yes", "no"], ["yesno", "nope"]),
        ({"choice": CHOICES}, CHOICES, ["b", "aa"]),
        ({"grammar": GBNF}, ["1+22", "((é)+A)", "7"], ["+", "(1", "1+"]),
        ({"grammar": 'root ::= [a-z]+ "x" | ws\nws ::= | " "'}, ["abx", "xxx", " "], ["ab", "x"]),
        ({"grammar": LARK}, ["((abc))", "x"], ["((abc)", "1"]),
    ],
)  # fmt: skip
def test_what_is_a_sentence(
    make: MakeMatcher, tokenizer: Any, values: dict[str, Any], sentences: list[str], others: list[str]
) -> None:
    for text in sentences:
        matcher = make(**values)
        assert follow(matcher, [*tokenizer.encode(text), END]), text
        assert matcher.is_finished and matcher.error is None
    for text in others:
        assert not follow(make(**values), [*tokenizer.encode(text), END]), text


# --------------------------------------------------------------------------------------------------------------
# what cannot be compiled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"json": {"type": "x"}}, "StructuredOutputsParams.json: '{\"type\": \"x\"}' is not valid: Invalid type: x"),
        ({"json": {"not": {}}}, "StructuredOutputsParams.json: .* is not valid: Unimplemented keys: .*not.*"),
        ({"json": {"$ref": "#/x"}}, "StructuredOutputsParams.json: .* is not valid: Pointer '/x' does not exist"),
        ({"json": {"minimum": 5, "maximum": 3, "type": "integer"}}, ".*minimum .5. is greater than maximum .3."),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, ".*: no text fulfils it"),
        ({"json": {"description": "x" * 300_000}}, ".*: 300019 characters are more than the 262144 that are compiled"),
        ({"json": {"pattern": "\ud800", "type": "string"}}, ".*not JSON serializable.*"),
        ({"regex": "\ud800"}, ".*surrogates not allowed"),
        ({"regex": "("}, r"StructuredOutputsParams.regex: '\(' is not valid: unclosed group"),
        ({"regex": r"(a)\1"}, ".*: backreferences are not supported"),
        ({"regex": "a{0}"}, ".*: only the empty text fulfils it"),
        ({"choice": ["x" * 200_000, "y" * 200_000]}, ".*: 400002 characters are more than .*"),
        ({"choice": [f"{i:x}" for i in range(40_000)]}, ".* is not valid: .*too big .*"),  # its automaton
        ({"grammar": "start: X"}, 'StructuredOutputsParams.grammar: \'start: X\' is not valid: .*unknown name: "X"'),
        ({"grammar": "hello"}, "StructuredOutputsParams.grammar: 'hello' is not valid: .*"),
        ({"grammar": 'a ::= "x"'}, ".* is not valid: No 'root' rule found"),
        ({"grammar": 'root ::= "x'}, ".* is not valid: Unexpected end of input at line 1.*"),
        ({"grammar": "root ::= " + "[" * 60_000}, ".* is not valid: Unexpected end of input at line 1.*"),
        ({"grammar": 'root ::= "a"' + "\n" * 60_000 + "b"}, ".* is not valid: Expected ::= at line 60001.*"),
        ({"grammar": "\n" * 60_000 + "b"}, "StructuredOutputsParams.grammar: .* is not valid: .* Expected token ':'.*"),
        ({"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000}, ".* is not valid: nested too deeply"),
        ({"grammar": 'start: a\na: a "x"'}, ".* is not valid: no text fulfils it"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_one_line(compiler: GrammarCompiler, values: dict[str, Any], message: str) -> None:
    for _ in range(2):  # from the cache too
        with pytest.raises(ConfigError, match=rf"\A{message}\Z") as error:
            compiler.submit(StructuredOutputsParams(**values)).result()
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["rules", "schemas"])
def test_a_long_chain_of_references_does_not_end_the_process(compiler: GrammarCompiler, kind: str) -> None:
    if kind == "rules":
        rules = "\n".join(f"a{i}:a{i + 1}" for i in range(5000))
        params = StructuredOutputsParams(grammar=f'start: a0\n{rules}\na5000: "x"')
    else:
        items = {f"a{i}": {"items": {"$ref": f"#/$defs/a{i + 1}"}, "type": "array"} for i in range(4000)}
        params = StructuredOutputsParams(json={"$ref": "#/$defs/a0", "$defs": {**items, "a4000": {}}})
    assert follow(compiler.submit(params).result().matcher([END]), []) is True


def test_a_compilation_that_takes_too_long_is_given_up(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_COMPILE_SECONDS", 0.05)
    go_on = threading.Event()
    monkeypatch.setattr(structured, "grammar_of", lambda params: go_on.wait() or "")
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    try:
        for regex in "abc":  # what is given up keeps nobody out, though it goes on
            message = f"regex: '{regex}' is not valid: it takes more than 0.05 s to compile"
            with pytest.raises(ConfigError, match=message):
                compiler.submit(StructuredOutputsParams(regex=regex)).result(timeout=30)
    finally:
        go_on.set()
        compiler.close()


def test_nobody_waits_for_a_compiler_that_is_closed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(structured, "grammar_of", lambda params: go_on.wait() or "")
    compiler = GrammarCompiler(tokenizer, VOCAB, [END])
    futures = [compiler.submit(StructuredOutputsParams(regex=regex)) for regex in "abc"]  # the last has not begun
    compiler.close()
    go_on.set()
    for future in futures:
        with pytest.raises(ConfigError, match="the engine was closed"):
            future.result(timeout=30)
    compiler.close()


def test_no_thread_is_to_be_had(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for a stack, say: that request's error, of this time alone."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    compiler, params = GrammarCompiler(tokenizer, VOCAB, [END]), StructuredOutputsParams(regex="a")
    with monkeypatch.context() as no_room:
        no_room.setattr(structured, "_start_with_stack", refuse)
        with pytest.raises(ConfigError, match="regex: 'a' is not valid: can't start new thread"):
            compiler.submit(params).result()
    assert follow(compiler.submit(params).result().matcher([END]), tokenizer.encode("a"))
    compiler.close()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "structured output needs a tokenizer: give InferenceEngine one"),
        ("slow", r"structured output does not work with this tokenizer \(SlowTokenizer\): Only fast .* are supported"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(tokenizer: Any, message: str) -> None:
    class SlowTokenizer:
        eos_token_id, all_special_ids = None, ()

        def __len__(self) -> int:
            return 10

    compiler = GrammarCompiler(tokenizer and SlowTokenizer(), 10)
    for values in ({"regex": "a"}, {"regex": "b"}):
        with pytest.raises(ConfigError, match=message):
            compiler.submit(StructuredOutputsParams(**values)).result()
    compiler.close()


SCRIPT = """
import sys, time
from transformers import AutoTokenizer
from meshlm.config import StructuredOutputsParams
from meshlm.engine import structured

structured._EXIT_SECONDS = float(sys.argv[3])
compiler = structured.GrammarCompiler(AutoTokenizer.from_pretrained(sys.argv[1]), 49152, [2])
compiler.submit(StructuredOutputsParams(regex="a")).result()
compiler.submit(StructuredOutputsParams(json=sys.argv[2]))
time.sleep(0.1)
"""
SECONDS = json.dumps({"type": "integer", "multipleOf": 99_991})
MINUTES = json.dumps({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(40)]})


@pytest.mark.slow  # two processes
@pytest.mark.parametrize(("schema", "patience"), [(SECONDS, 30), (MINUTES, 0.5)])
def test_a_process_ends_well_while_one_compiles(demo_model: Path, schema: str, patience: float) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, demo_model, schema, str(patience)], timeout=100)
    assert run.returncode == 0


def test_compiled_grammars_are_kept(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    params = StructuredOutputsParams(regex="kept")
    assert compiler.submit(params) is compiler.submit(StructuredOutputsParams(regex="kept"))
    monkeypatch.setattr(structured, "_CACHED", 2)
    first = compiler.submit(params)
    for text in "ab":
        compiler.submit(StructuredOutputsParams(choice=[text]))
    assert compiler.submit(params) is not first
    too_large = StructuredOutputsParams(regex="a" * 300_000)
    assert compiler.submit(too_large) is not compiler.submit(too_large)


# --------------------------------------------------------------------------------------------------------------
# end tokens, padding


def test_an_end_token_may_come_where_the_sentence_is_whole(make: MakeMatcher, tokenizer: Any) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    matcher = make((END, CUSTOM_END, b), regex="ab?")  # one of them is text otherwise
    assert not matcher.accept(END) and not matcher.accept(CUSTOM_END)
    assert matcher.accept(a)
    assert next_tokens(matcher) == {END, CUSTOM_END, b}
    assert matcher.accept(b)  # as an end token
    assert matcher.is_finished and not matcher.accept(b) and next_tokens(matcher) == {END, CUSTOM_END, b}
    matcher.rollback(1)
    assert not matcher.accept(VOCAB + 5) and not matcher.accept(-1)
    assert matcher.accept(END) and matcher.is_finished


@pytest.mark.parametrize("regex", ["ab", "a(b[^\\x00-\\x{10FFFF}]?)"])
def test_without_end_tokens_a_whole_sentence_is_finished(make: MakeMatcher, tokenizer: Any, regex: str) -> None:
    matcher = make((), regex=regex)
    assert follow(matcher, tokenizer.encode("ab"))
    mask = new_mask()
    assert not matcher.fill(mask) and matcher.is_finished and matcher.error is None
    assert (mask == -1).all()  # a step under way must draw something
    assert not matcher.accept(END)
    matcher.rollback(1)
    assert not matcher.is_finished and matcher.fill(mask)


@pytest.mark.parametrize("vocab_size", [VOCAB, 49152, 40000, 39990])
def test_ids_that_only_the_head_or_the_tokenizer_has(tokenizer: Any, vocab_size: int) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size)
    matcher = compiler.submit(StructuredOutputsParams(regex=r"[\s\S]+")).result().matcher([END])
    mask = np.zeros((vocab_size + 31) // 32, np.int32)
    assert matcher.fill(mask)
    ids = allowed(mask)
    assert len(ids) > 0.9 * min(vocab_size, 49152)
    assert ids.max() < min(vocab_size, 49152)
    assert not set(tokenizer.all_special_ids) & set(ids.tolist())
    compiler.close()


def test_a_vocabulary_without_the_token_that_must_come(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, 20, [END])  # special tokens only
    with pytest.raises(ConfigError, match="no text fulfils it"):
        compiler.submit(StructuredOutputsParams(regex="a")).result()
    compiler.close()


# --------------------------------------------------------------------------------------------------------------
# rollback, drafts

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "string"}},
}
DOCUMENT = '{"a": [1, 23, 456], "b": "some text"}'


def test_rollback_equals_a_fresh_matcher(make: MakeMatcher, tokenizer: Any) -> None:
    token_ids = [*tokenizer.encode(DOCUMENT), END]
    fresh = make(json=SCHEMA)
    states = [next_tokens(fresh)]
    for token_id in token_ids:
        assert fresh.accept(token_id)
        states.append(next_tokens(fresh))
    for kept in range(len(token_ids)):
        matcher = make(json=SCHEMA)
        for token_id in token_ids:
            assert matcher.accept(token_id)
        matcher.rollback(len(token_ids) - kept)
        assert not matcher.is_finished or kept == len(token_ids) - 1
        assert next_tokens(matcher) == states[kept]
        assert follow(matcher, token_ids[kept:])


@pytest.mark.parametrize("num_good", [0, 1, 5, None])
def test_drafts(make: MakeMatcher, tokenizer: Any, num_good: int | None) -> None:
    token_ids = [*tokenizer.encode(DOCUMENT), END]
    past, drafts = token_ids[:2], token_ids[2:]
    if num_good is not None:
        drafts[num_good] = CUSTOM_END  # a special token, which is no text
    else:
        drafts += [END]
        num_good = len(drafts) - 3  # all before the bracket that finishes it
    matcher = make(json=SCHEMA)
    assert follow(matcher, past)
    masks = new_mask(len(drafts))
    assert matcher.fill_after(drafts, masks) == num_good
    alone = make(json=SCHEMA)
    assert follow(alone, past)
    for row, token_id in zip(masks[:num_good], drafts, strict=False):
        assert alone.accept(token_id)
        assert set(allowed(row).tolist()) == next_tokens(alone)
    assert follow(matcher, token_ids[2:]) and matcher.is_finished  # the drafts left no trace


def test_a_guess_that_leads_nowhere_leaves_no_error(tokenizer: Any) -> None:
    """A token that is allowed, but after which the model has none: it is only a guess."""
    a, b, z = (tokenizer.encode(text)[0] for text in "abz")
    compiler = GrammarCompiler(tokenizer, z, [END])  # all before it
    matcher = compiler.submit(StructuredOutputsParams(regex="az|bb")).result().matcher((END,))
    masks = np.zeros((2, (z + 31) // 32), np.int32)
    assert matcher.fill_after([a, b], masks) == 0 and matcher.fill_after([b, b], masks) == 1
    assert matcher.error is None and matcher.accept(b) and matcher.accept(b) and matcher.is_finished
    compiler.close()


def test_a_matcher_that_cannot_go_on_says_why(
    make: MakeMatcher, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = make(regex="a")
    matcher.rollback(1)  # more than there is
    assert matcher.error is not None and matcher.error.startswith("structured output cannot go on: ")
    assert not matcher.is_finished and not matcher.accept(tokenizer.encode("a")[0]) and not matcher.fill(new_mask())
    assert follow(make(regex="a"), [*tokenizer.encode("a"), END])  # others can


# --------------------------------------------------------------------------------------------------------------
# every finished output validates


RANDOM_TOKENS = 40
MOST_TOKENS = 400


def write_at_random(matcher: Matcher, rng: random.Random, closing: list[int]) -> list[int]:
    """Token ids of a finished output: anything that may come, and after `RANDOM_TOKENS` what closes the document."""
    output: list[int] = []
    mask = new_mask()
    while matcher.fill(mask) and len(output) < MOST_TOKENS:
        bits = mask.view(np.uint32)
        closed = [i for i in closing if bits[i // 32] >> np.uint32(i % 32) & 1]
        if len(output) < RANDOM_TOKENS or not closed:
            token_id = int(rng.choice(allowed(mask)))
        else:
            token_id = closed[0] if closed[0] in closing[:2] else rng.choice(closed)
        assert matcher.accept(token_id)
        output.append(token_id)
    assert matcher.error is None and matcher.is_finished, (matcher.error, output)
    return output


@pytest.mark.parametrize("seed", range(8))
def test_every_finished_output_validates(make: MakeMatcher, tokenizer: Any, seed: int) -> None:
    rng = random.Random(seed)
    closing = [END, *(tokenizer.encode(text)[0] for text in '"}]@é.-xa01nt,:')]  # in this order the first two
    for _ in range(25):
        schema = a_whole_schema(rng)
        output = write_at_random(make(json=schema), rng, closing)
        text = tokenizer.decode(output[:-1] if output[-1] == END else output)
        check_json(text, schema)
