"""What a request's parameters mean for one model's vocabulary: token ids checked, words turned into them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..config import SamplingParams
from .logits_spec import LogitsSpec
from .portable import Portable


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and how many tokens the model has logits for; the tokenizer may know fewer, or more."""

    tokenizer: Any  # None: there is none
    size: int

    def check(self, params: SamplingParams) -> None:
        """Raises ValueError, one line, for what names tokens that are not there, or needs a tokenizer."""
        for name, ids in _token_ids(params):
            for token_id in ids:
                if token_id >= self.size:
                    raise ValueError(f"{name}: {out_of_range(token_id, self.size)}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.size:
                raise ValueError(
                    f"{name}={getattr(params, name)} is more than the vocabulary's {self.size} tokens; -1 gives all"
                )
        if self.tokenizer is None:
            if params.stop:
                raise ValueError(f"stop={list(params.stop)}: stop strings need a tokenizer, and the engine has none")
            if words := [word for word in params.bad_words or () if isinstance(word, str)]:
                raise ValueError(
                    f"bad_words={words}: strings need a tokenizer, and the engine has none; give token ids"
                )
            if params.structured_outputs is not None:
                raise ValueError("structured_outputs need a tokenizer, and the engine has none")

    def logits_spec(self, params: SamplingParams, num_prompt_tokens: int) -> LogitsSpec:
        """What settled parameters (`SamplingParams.resolve`) ask for.

        Tokens that are not there can only come from the model's own settings, and are left out: none is ever drawn.
        Raises ValueError, one line, if no token is left to be drawn, or words cannot be spelt.
        """
        assert params.repetition_penalty is not None and params.no_repeat_ngram_size is not None
        bias = params.logit_bias or {}
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else params.eos_token_ids or ())}
        allowed = params.allowed_token_ids
        spec = LogitsSpec(
            num_prompt_tokens=num_prompt_tokens,
            bias=tuple((token_id, bias[token_id]) for token_id in self._known(bias) if bias[token_id]),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            bad_words=tuple(dict.fromkeys(self._bad_words(params))),
            min_tokens=params.min_tokens,
            end_ids=self._known(ends),
            allowed=None if allowed is None else self._known(allowed),
            suppressed=self._known(params.suppress_tokens or ()),
            begin_suppressed=self._known(params.begin_suppress_tokens or ()),
            processors=tuple(
                Portable(processor, f"SamplingParams.logits_processors[{place}]")
                for place, processor in enumerate(params.logits_processors)
            ),
        )
        self._refuse_none(spec, is_forced=params.forced_token_ids is not None)
        return spec

    def _refuse_none(self, spec: LogitsSpec, is_forced: bool) -> None:
        """Raises ValueError if no token may be the first that is drawn. is_forced: the output's first is not."""
        banned = {*spec.suppressed, *(word[0] for word in spec.bad_words if len(word) == 1)}
        banned |= {*(spec.end_ids if spec.min_tokens else ()), *(() if is_forced else spec.begin_suppressed)}
        allowed = range(self.size) if spec.allowed is None else spec.allowed
        if banned and all(token_id in banned for token_id in allowed):
            raise ValueError(
                "suppress_tokens, begin_suppress_tokens, bad_words and min_tokens (end tokens) together ban all of "
                f"{'the vocabulary' if spec.allowed is None else 'allowed_token_ids'}; let one token be output"
            )

    def _known(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({token_id for token_id in ids if token_id < self.size}))

    def _bad_words(self, params: SamplingParams) -> Iterator[tuple[int, ...]]:
        """Strings as in vLLM, after a space too; token ids as in transformers, where an end token is no bad word."""
        for word in params.bad_words or ():
            if isinstance(word, str):
                yield from self._spellings(word)
            elif max(word) < self.size and (len(word) > 1 or word[0] not in (params.eos_token_ids or ())):
                yield word

    def _spellings(self, word: str) -> Iterator[tuple[int, ...]]:
        """A word's token ids where text begins, and after a space if those are others."""
        plain = self._encode(word.lstrip())
        yield plain
        spaced = self._encode(" " + word.lstrip())
        if spaced[-len(plain) :] != plain:
            yield spaced

    def _encode(self, word: str) -> tuple[int, ...]:
        try:
            ids = tuple(self.tokenizer.encode(word, add_special_tokens=False))
        except Exception as error:
            raise ValueError(f"bad_words: the tokenizer cannot encode {word!r}: {error_line(error)}") from error
        if not ids:
            raise ValueError(f"bad_words: the tokenizer makes no token of {word!r}")
        if max(ids) >= self.size:
            raise ValueError(
                f"bad_words: {word!r} has a token that the model does not: {out_of_range(max(ids), self.size)}"
            )
        return ids


def _token_ids(params: SamplingParams) -> Iterator[tuple[str, Iterable[int]]]:
    """Every token id that a caller names, by field; end tokens come from the model, and may lie outside."""
    for name in ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "allowed_token_ids", "forced_token_ids"):
        yield name, getattr(params, name) or ()
    yield "logit_bias", params.logit_bias or {}
    yield "bad_words", (token for word in params.bad_words or () if not isinstance(word, str) for token in word)


def out_of_range(token_id: int, vocab_size: int) -> str:
    return f"token id {token_id} is out of range; the vocabulary has 0 to {vocab_size - 1}"


def error_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
