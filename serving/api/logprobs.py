"""Log-probabilities as the endpoints tell them."""

import codecs
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from ...engine.output import CompletionOutput
from ...engine.step import TokenLogprobs
from .token_texts import TokenTexts

LOWEST = -9999.0  # OpenAI's, of what is not probable at all: JSON has no infinity

_Told = tuple[int, TokenLogprobs]  # a token's id, and what is told of it


class LogprobsReader:
    """What is told of one completion's tokens, as they come. The end token, which its text does not have, is left out.

    end_ids: the model's end tokens.
    """

    def __init__(self, end_ids: Iterable[int]) -> None:
        self._end_ids, self._num_read = frozenset(end_ids), 0

    def read(self, output: CompletionOutput) -> list[_Told]:
        """Of the tokens that are new since the last time."""
        assert output.logprobs is not None
        first, self._num_read = self._num_read, len(output.logprobs)
        told = list(zip(output.token_ids[first:], output.logprobs[first:], strict=True))
        is_at_end = output.finish_reason == "stop" and output.stop_reason is None
        return told[:-1] if is_at_end and told and told[-1][0] in self._end_ids else told


def chat_logprobs(texts: TokenTexts, told: Sequence[_Told]) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, spelt = texts.as_text(token_id), texts.as_bytes(token_id)
        return {"token": text.removeprefix("bytes:"), "logprob": max(logprob, LOWEST), "bytes": list(spelt)}

    return [
        entry(token_id, one.logprob)
        | {"top_logprobs": [entry(*pair) for pair in zip(one.top_ids, one.top_logprobs, strict=True)]}
        for token_id, one in told
    ]


class CompletionLogprobs:
    """Those of /v1/completions: lists of one entry a token, with where in the text it begins.

    start: length of the text before, in characters; num_top: how many likeliest tokens were asked for.
    """

    def __init__(self, texts: TokenTexts, num_top: int, start: int) -> None:
        self._texts, self._num_top, self._offset = texts, num_top, start
        self._decoder = codecs.getincrementaldecoder("utf-8")(
            "replace"
        )  # characters begin in one token, end in another

    def of_output(self, told: Sequence[_Told]) -> dict[str, Any]:
        lengths = [0 if self._texts.is_special(token_id) else self._length(token_id) for token_id, _ in told]
        offsets = list(accumulate(lengths, initial=self._offset))
        self._offset = offsets.pop()
        return self._lists([token_id for token_id, _ in told], [one for _, one in told], offsets)

    def of_prompt(self, text: str, token_ids: Sequence[int], told: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of a prompt's tokens, of which nothing is told of the first. What tokenizers add is not in the text."""
        offsets, place = [], 0
        for token_id in token_ids:
            offsets.append(place)
            piece = self._decoder.decode(self._texts.as_bytes(token_id))
            if not text.startswith(piece, place):
                piece = piece.removeprefix(" ")  # which some tokenizers put before a text
            place += len(piece) if text.startswith(piece, place) else 0
        self._decoder.reset()
        self._offset = len(text)
        return self._lists(token_ids, told, offsets)

    def _length(self, token_id: int) -> int:
        return len(self._decoder.decode(self._texts.as_bytes(token_id)))

    def _lists(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs | None], offsets: list[int]
    ) -> dict[str, Any]:
        tops = [self._top(token_id, one) for token_id, one in zip(token_ids, told, strict=True)]
        return {
            "text_offset": offsets,
            "token_logprobs": [None if one is None else max(one.logprob, LOWEST) for one in told],
            "tokens": [self._texts.as_text(token_id) for token_id in token_ids],
            "top_logprobs": tops if self._num_top else None,
        }

    def _top(self, token_id: int, told: TokenLogprobs | None) -> dict[str, float] | None:
        """The likeliest ones and the token itself."""
        if told is None:
            return None
        top: dict[str, float] = {}
        for each, logprob in [*zip(told.top_ids, told.top_logprobs, strict=True), (token_id, told.logprob)]:
            top.setdefault(self._texts.as_text(each), max(logprob, LOWEST))
        return top
