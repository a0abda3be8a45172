"""Text token by token, with the demo model's tokenizer and without a fast one."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from meshlm.engine.detokenizer import Detokenizer

TEXTS = {
    "ascii": "Hello, world!  Two spaces,\ttabs\n\nand lines. don't can't",
    "emoji": "ok 🙂🙃 👩‍👩‍👧‍👦 family, 🇫🇷 flag, 👍🏽 skin, 🏴‍☠️ end",
    "cjk": "今日は良い天気ですね。中文分词测试,한국어 문장입니다",
    "combining": "é n\u0303 ą\u0301 naïve a\u0300\u0316\u0331 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
    "scripts": "العربية עברית हिन्दी ไทย Ελληνικά русский 𐍈𐍉 𝕄𝕖𝕤𝕙",
    "controls": "zero\u200bwidth\u200d joiner \u00a0 nbsp \r\n crlf \u2028 end",
    "code": "def f(x):\n    return {'a': x ** 2}  # ½ ≤ ∑",
    "empty": "",
}


class Plain:
    """A tokenizer that only knows how to decode a whole list: one without a fast backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, *args: Any, **values: Any) -> str:
        return str(self._tokenizer.decode(*args, **values))


@pytest.fixture(scope="module")
def fast(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model, local_files_only=True)


@pytest.fixture(params=["fast", "plain"])
def tokenizer(fast: Any, request: pytest.FixtureRequest) -> Any:
    return fast if request.param == "fast" else Plain(fast)


def feed(detokenizer: Detokenizer, token_ids: list[int], end: bool = True) -> tuple[list[str], bool]:
    """(what each token adds to the text, whether a stop string was reached)."""
    deltas, before = [], ""
    for token_id in token_ids:
        stopped = detokenizer.append(token_id, look_for_stop=True)
        assert detokenizer.text.startswith(before), "text that went out is never taken back"
        deltas.append(detokenizer.text[len(before) :])
        before = detokenizer.text
        if stopped:
            return deltas, True
    if end:
        detokenizer.finish()
        assert detokenizer.text.startswith(before)
        deltas.append(detokenizer.text[len(before) :])
    return deltas, False


@pytest.mark.parametrize("name", TEXTS)
def test_the_parts_make_the_whole_and_no_character_is_halved(tokenizer: Any, fast: Any, name: str) -> None:
    text = TEXTS[name]
    token_ids = fast.encode(text)
    deltas, _ = feed(Detokenizer(tokenizer, (), True), token_ids)
    assert "".join(deltas) == fast.decode(token_ids) == text
    assert all("\ufffd" not in delta for delta in deltas)


def test_the_texts_do_split_characters_over_tokens(fast: Any) -> None:
    """Guards the test above."""
    for name in ("emoji", "cjk", "scripts"):
        pieces = [fast.decode([token_id]) for token_id in fast.encode(TEXTS[name])]
        assert sum("\ufffd" in piece for piece in pieces) > 10


def test_text_comes_as_soon_as_it_is_whole(fast: Any) -> None:
    token_ids = fast.encode("a🙂b")
    deltas, _ = feed(Detokenizer(fast, (), True), token_ids, end=False)
    assert [delta for delta in deltas if delta] == ["a", "🙂", "b"]
    assert len(deltas) == len(token_ids) > 3


@pytest.mark.parametrize("name", ["emoji", "cjk", "scripts"])
def test_a_character_cut_off_at_the_end_is_left_out(tokenizer: Any, fast: Any, name: str) -> None:
    token_ids = fast.encode(TEXTS[name])
    for stop in range(len(token_ids)):
        detokenizer = Detokenizer(tokenizer, (), True)
        feed(detokenizer, token_ids[:stop])
        assert TEXTS[name].startswith(detokenizer.text)
        assert "\ufffd" not in detokenizer.text
        whole = fast.decode(token_ids[:stop])
        assert detokenizer.text == whole.rstrip("\ufffd")


def test_bytes_that_make_no_character_do_not_hold_up_the_rest(tokenizer: Any, fast: Any) -> None:
    broken = fast.encode("🙂")[:1]
    token_ids = [*fast.encode("a"), *broken, *fast.encode("bcd"), *broken, *broken, *fast.encode(" end")]
    deltas, _ = feed(Detokenizer(tokenizer, (), True), token_ids)
    assert "".join(deltas) == fast.decode(token_ids)


def test_special_tokens_are_left_out_or_not(tokenizer: Any, fast: Any) -> None:
    token_ids = [*fast.encode("Yes"), fast.eos_token_id, *fast.encode(" more")]
    assert "".join(feed(Detokenizer(tokenizer, (), True), token_ids)[0]) == "Yes more"
    with_specials = "".join(feed(Detokenizer(tokenizer, (), False), token_ids)[0])
    assert with_specials == f"Yes{fast.eos_token} more"


# ---- stop strings ---------------------------------------------------------------------------------------------------


def substrings(text: str, longest: int) -> list[str]:
    return sorted({text[i : i + n] for i in range(len(text)) for n in range(1, longest + 1) if i + n <= len(text)})


@pytest.mark.parametrize("text", ["The quick brown fox, aaab aaab!", "ok 🙂🙃 天気 n\u0303o"])
def test_text_ends_before_any_stop_string(fast: Any, text: str) -> None:
    """Every stop string there can be: within a token, over several, at the start, at the end."""
    token_ids = fast.encode(text)
    for stop in substrings(text, 7):
        detokenizer = Detokenizer(fast, (stop,), True)
        deltas, stopped = feed(detokenizer, token_ids)
        assert stopped and "".join(deltas) == detokenizer.text == text[: text.index(stop)]


def test_it_stops_at_the_token_that_completes_the_stop_string(fast: Any) -> None:
    token_ids = fast.encode("one two three four five")
    deltas, stopped = feed(Detokenizer(fast, (" three",), True), token_ids)
    whole = next(n for n in range(len(token_ids)) if " three" in fast.decode(token_ids[:n]))
    assert stopped and len(deltas) == whole


def test_the_beginning_of_a_stop_string_is_held_back(fast: Any) -> None:
    detokenizer = Detokenizer(fast, ("\nUser:",), True)
    seen = []
    for token_id in fast.encode("Hi\nUse it"):
        assert not detokenizer.append(token_id, look_for_stop=True)
        seen.append(detokenizer.text)
    assert not any(text.endswith(("\n", "\nUse")) for text in seen)
    assert seen[-1] == "Hi\nUse it", "it was none"


def test_what_was_held_back_comes_at_the_end(fast: Any) -> None:
    detokenizer = Detokenizer(fast, ("END",), True)
    deltas, _ = feed(detokenizer, fast.encode("The EN"), end=False)
    assert "".join(deltas) == "The "
    detokenizer.finish()
    assert detokenizer.text == "The EN"


def test_the_first_of_several_stop_strings_counts(fast: Any) -> None:
    token_ids = fast.encode("alpha beta gamma")
    for stops in (("gamma", "beta"), ("beta", "gamma"), ("eta", "beta", "gamma")):
        detokenizer = Detokenizer(fast, stops, True)
        assert feed(detokenizer, token_ids)[1]
        assert detokenizer.text == "alpha "


def test_a_stop_string_before_the_least_length_is_text(fast: Any) -> None:
    detokenizer = Detokenizer(fast, ("b",), True)
    stopped = [
        detokenizer.append(token_id, look_for_stop=index >= 3)
        for index, token_id in enumerate(i for c in "abcab" for i in fast.encode(c))
    ]
    assert stopped == [False, False, False, False, True]
    assert detokenizer.text == "abca"


def test_a_stream_that_lost_its_place_goes_on(fast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    detokenizer = Detokenizer(fast, (), True)
    first, second = fast.encode("Hello"), fast.encode(" world")
    feed(detokenizer, first, end=False)

    class Lost:
        def step(self, *_: Any) -> None:
            raise Exception("Invalid prefix encountered while decoding stream")

    detokenizer._stream = Lost()
    feed(detokenizer, second)
    assert detokenizer.text == "Hello world"
