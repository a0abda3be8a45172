"""Types of fields that hold token ids. What is in the vocabulary is the model's to say."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

TokenIds = Annotated[Sequence[Annotated[int, Field(ge=0, strict=True)]], AfterValidator(tuple)]


def not_empty(ids: tuple[int, ...]) -> tuple[int, ...]:
    if not ids:
        raise ValueError("must hold a token id")
    return ids


def _as_bias(value: Any) -> Any:
    """{token id: bias in [-100, 100]}; an id may be a string of digits, as it is in JSON."""
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping of token ids to numbers")
    return {_as_token_id(key): _bias(key, bias) for key, bias in value.items()}


def _as_token_id(key: Any) -> int:
    if isinstance(key, str) and key.isascii() and key.isdecimal():
        return int(key)
    if not isinstance(key, int) or isinstance(key, bool) or key < 0:
        raise ValueError(f"{key!r} is not a token id")
    return key


def _bias(key: Any, bias: Any) -> float:
    if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
        raise ValueError(f"the bias of token {key} must be a number in [-100, 100]")
    return float(bias)


def _as_words(value: Any) -> Any:
    if not isinstance(value, Sequence):
        raise ValueError("must be a list of strings, or of lists of token ids")
    return tuple(_as_word(word) for word in value)


def _as_word(word: Any) -> str | tuple[int, ...]:
    if isinstance(word, str):
        if not word.strip():
            raise ValueError("must not hold an empty string")
        return word
    if not isinstance(word, Sequence) or not word:
        raise ValueError(f"{word!r} is neither a string nor a list of token ids")
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in word):
        raise ValueError(f"{list(word)} must hold token ids")
    return tuple(word)


# Checked here whole, so that a mistake is one line, not one for each branch of a union.
TokenBias = Annotated[Mapping[int, float], BeforeValidator(_as_bias)]
Words = Annotated[Sequence[str | tuple[int, ...]], BeforeValidator(_as_words)]
