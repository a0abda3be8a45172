"""What parameters mean for a vocabulary: checked, and as the numbers that go to the ranks."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meshlm.config import SamplingParams
from meshlm.engine.logits_spec import LogitsSpec
from meshlm.engine.vocabulary import Vocabulary

SIZE = 12
WORDS = ["a", "b", "ab", "Ġ", "Ġa", "Ġab", "c", "d", "Ġc", "far"]  # ids 0 to 9
MERGES = [("Ġ", "a"), ("Ġa", "b"), ("a", "b"), ("Ġ", "c")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level, so that a space belongs to the word after it."""
    model = models.BPE({word: i for i, word in enumerate(WORDS)} | {"e": SIZE}, MERGES)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def spec(tokenizer: Any = None, /, **values: Any) -> LogitsSpec:
    vocabulary, params = Vocabulary(tokenizer, SIZE), SamplingParams(**values)
    vocabulary.check(params)
    return vocabulary.logits_spec(params.resolve(SamplingParams(eos_token_ids=[2, 99])), num_prompt_tokens=4)


NEUTRAL = LogitsSpec(num_prompt_tokens=4, end_ids=(2,))


@pytest.mark.parametrize(
    ("values", "changes", "history"),
    [
        ({}, {}, False),
        ({"temperature": 0.5, "top_k": 3, "logprobs": 2, "n": 2}, {}, False),
        ({"repetition_penalty": 1.0, "presence_penalty": 0, "logit_bias": {}, "bad_words": []}, {}, False),
        ({"logit_bias": {"7": 2, 3: -1}}, {"bias": ((3, -1.0), (7, 2.0))}, False),
        ({"logit_bias": {7: 0}}, {}, False),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, True),
        ({"presence_penalty": -0.5}, {"presence_penalty": -0.5}, True),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}, True),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}, True),
        ({"bad_words": [[5], [5]]}, {"bad_words": ((5,),)}, False),
        ({"bad_words": [[5, 6], [7]]}, {"bad_words": ((5, 6), (7,))}, True),
        ({"bad_words": [[2], [2, 3]]}, {"bad_words": ((2, 3),)}, True),  # an end token is no bad word
        ({"allowed_token_ids": [5, 3, 5]}, {"allowed": (3, 5)}, False),
        ({"suppress_tokens": [3]}, {"suppressed": (3,)}, False),
        ({"begin_suppress_tokens": [3, 2]}, {"begin_suppressed": (2, 3)}, False),
        ({"min_tokens": 3, "stop_token_ids": [7]}, {"min_tokens": 3, "end_ids": (2, 7)}, False),
        ({"min_tokens": 3, "stop_token_ids": [7], "ignore_eos": True}, {"min_tokens": 3, "end_ids": (7,)}, False),
    ],
    ids=str,
)
def test_logits_spec(values: dict[str, Any], changes: dict[str, Any], history: bool) -> None:
    made = spec(**values)
    assert made == replace(NEUTRAL, **changes) == pickle.loads(pickle.dumps(made))
    assert made.is_neutral == (not changes) and made.needs_history == history
    assert hash(made) is not None


def test_processors_can_be_sent_to_other_processes() -> None:
    made = spec(logits_processors=[max])
    (there,) = pickle.loads(pickle.dumps(made)).processors
    assert made.needs_history and there(3, 5) == 5


def test_bans_that_can_never_hold_are_neutral() -> None:
    assert spec(min_tokens=3, ignore_eos=True).is_neutral
    assert not spec(min_tokens=3).is_neutral


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("ab", ((2,), (5,))),  # where text begins, and after a space
        (" ab", ((2,), (5,))),
        ("ca", ((6, 0), (8, 0))),
        ("d", ((7,),)),  # after a space it is a space and the same token, which is banned already
    ],
)
def test_words_are_banned_as_they_can_be_spelt(
    tokenizer: Any, word: str, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert spec(tokenizer, bad_words=[word]).bad_words == expected


def test_tokens_of_a_models_own_settings_that_are_not_there_are_left_out() -> None:
    model = SamplingParams(
        suppress_tokens=[3, 50], begin_suppress_tokens=[60], bad_words=[[4], [4, 70]], logit_bias={5: 1.0, 80: 1.0}
    )
    made = Vocabulary(None, SIZE).logits_spec(SamplingParams().resolve(model), 4)
    assert made == LogitsSpec(4, bias=((5, 1.0),), bad_words=((4,),), suppressed=(3,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            ({name: [3, SIZE]}, f"{name}: token id 12 is out of range; the vocabulary has 0 to 11")
            for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "allowed_token_ids")
        ),
        ({"forced_token_ids": [12]}, "forced_token_ids: token id 12 is out of range; the vocabulary has 0 to 11"),
        ({"logit_bias": {"12": 1}}, "logit_bias: token id 12 is out of range; the vocabulary has 0 to 11"),
        ({"bad_words": [[1], [1, 12]]}, "bad_words: token id 12 is out of range; the vocabulary has 0 to 11"),
        ({"logprobs": 13}, "logprobs=13 is more than the vocabulary's 12 tokens; -1 gives all"),
        ({"prompt_logprobs": 13}, "prompt_logprobs=13 is more than the vocabulary's 12 tokens; -1 gives all"),
        ({"stop": "x"}, "stop=['x']: stop strings need a tokenizer, and the engine has none"),
        (
            {"bad_words": ["x", [1]]},
            "bad_words=['x']: strings need a tokenizer, and the engine has none; give token ids",
        ),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs need a tokenizer, and the engine has none"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        spec(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"suppress_tokens": range(SIZE)}, "the vocabulary"),
        ({"suppress_tokens": range(2, SIZE), "begin_suppress_tokens": [0, 1]}, "the vocabulary"),
        ({"allowed_token_ids": [7, 4], "bad_words": ["d"], "begin_suppress_tokens": [4]}, "allowed_token_ids"),
        ({"allowed_token_ids": [3], "begin_suppress_tokens": [3], "forced_token_ids": [5]}, None),
        ({"allowed_token_ids": [3, 4], "begin_suppress_tokens": [3]}, None),
    ],
)
def test_what_leaves_no_token_is_refused(tokenizer: Any, values: dict[str, Any], what: str | None) -> None:
    if what is None:
        assert spec(tokenizer, **values).allowed
        return
    message = "suppress_tokens, begin_suppress_tokens, bad_words and min_tokens .end tokens. together ban all of "
    with pytest.raises(ValueError, match=f"^{message}{what}; let one token be output$"):
        spec(tokenizer, **values)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("z", "bad_words: the tokenizer makes no token of 'z'"),
        (
            "e",
            "bad_words: 'e' has a token that the model does not: token id 12 is out of range; the vocabulary has 0 to "
            "11",
        ),
        ("\ud800", "bad_words: the tokenizer cannot encode '\\ud800': "),
    ],
)
def test_words_that_the_tokenizer_cannot_spell(tokenizer: Any, word: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        spec(tokenizer, bad_words=[word])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
