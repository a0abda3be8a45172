"""Types of fields that hold token ids. What is in the vocabulary is the model's to say."""

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def _integer(value: Any) -> int | None:
    """What is one, numpy's too; True and False are none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _as_integer(value: Any) -> int:
    number = _integer(value)
    if number is None:
        raise ValueError("must be an integer")
    return number


TokenIds = Annotated[Sequence[Annotated[int, BeforeValidator(_as_integer), Field(ge=0)]], AfterValidator(tuple)]


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
    token_id = _integer(key)
    if token_id is None or token_id < 0:
        raise ValueError(f"{key!r} is not a token id")
    return token_id


def _bias(key: Any, bias: Any) -> float:
    number: Any = bias if isinstance(bias, Real) else math.nan
    if isinstance(bias, bool) or not -100 <= number <= 100:
        raise ValueError(f"the bias of token {key} must be a number in [-100, 100]")
    return float(number)


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
    ids = tuple(number for token in word if (number := _integer(token)) is not None and number >= 0)
    if len(ids) < len(word):
        raise ValueError(f"{list(word)} must hold token ids")
    return ids


# Checked here whole, so that a mistake is one line, not one for each branch of a union.
TokenBias = Annotated[Mapping[int, float], BeforeValidator(_as_bias)]
Words = Annotated[Sequence[str | tuple[int, ...]], BeforeValidator(_as_words)]
