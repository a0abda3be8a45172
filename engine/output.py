"""What a request gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, TypeVar

from .step import TokenLogprobs

T = TypeVar("T")


def snapshot(kind: type[T], **fields: Any) -> T:
    """As `kind(**fields)` of a frozen dataclass, in a third of the time: each step makes some for each request."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


class _Later:
    """A field that a `snapshot` may have, under a name with an underscore before it, as a function and its arguments:
    it is made when it is first asked for, and found from then on before this is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, made: Any, kind: type) -> Any:
        fields = {} if made is None else made.__dict__
        given = fields.get(f"_{self.name}")
        if given is not None:
            function, *args = given
            fields[self.name] = function(*args)
            fields.pop(f"_{self.name}", None)  # another thread may have been as fast
        if self.name not in fields:
            raise AttributeError(f"{kind.__name__} has no {self.name}")
        return fields[self.name]


def later(*names: str) -> Callable[[type[T]], type[T]]:
    """Lets a dataclass have fields that are `_Later`: who asks for text alone does not pay for the rest in each step.

    What they are made of may grow meanwhile, but not change.
    """

    def decorate(kind: type[T]) -> type[T]:
        for name in names:
            setattr(kind, name, _Later(name))
        kind._later = names  # type: ignore[attr-defined]
        kind.__getstate__ = settle  # type: ignore[method-assign,assignment]  # a copy is whole
        return kind

    return decorate


def settle(made: Any) -> dict[str, Any]:
    """Makes all fields that are `_Later` now; gives all fields."""
    for name in made._later:
        getattr(made, name)
    return dict(made.__dict__)


def part(of: Sequence[T], start: int, stop: int) -> tuple[T, ...]:
    return tuple(of[start:stop])


@dataclass(frozen=True)
class RequestTimings:
    """Seconds, from the request's arrival on."""

    queue_s: float | None  # until its first step was scheduled
    ttft_s: float | None  # until its first token (time to first token)
    total_s: float  # until now, or its end
    token_s: tuple[float, ...]  # when each output token came; the differences are the inter-token latencies

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first."""
        count = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / count if count > 0 else None


@later("token_ids")
@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str  # ends before a stop string; never ends within a UTF-8 character
    token_ids: tuple[int, ...]  # an end token or the tokens of a stop string included
    finish_reason: str | None  # "stop", "length", "abort", "error"; None while it goes on
    stop_reason: str | int | None = None  # the stop string or token id that ended it, unless that is an end token
    delta: str = ""  # what `text` has gained since the request's last output
    logprobs: tuple[TokenLogprobs, ...] | None = None  # of each token, if asked for
    cumulative_logprob: float | None = None  # their sum; of a beam: of its tokens', after penalties and bans
    error: str | None = None  # why, if finish_reason is "error"


@later("timings")
@dataclass(frozen=True)
class RequestOutput:
    """A request's state so far; its end once `finished`."""

    request_id: str
    index: int  # which of the prompts of its `generate` or `stream`
    prompt: str | None  # None for a prompt given as token ids
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int  # prompt tokens whose keys and values were found in the prefix cache
    outputs: tuple[CompletionOutput, ...]  # n; of beams, fewer if no more were found
    finished: bool
    timings: RequestTimings
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # of each prompt token; None for the first
    pooled: tuple[bytes, ...] = ()  # of `embed`: float32 [hidden], whose sum is that of the last hidden states
    num_drafted: int = 0  # tokens that were guessed ahead, by speculative decoding
    num_accepted: int = 0  # of these, those that were right

    @property
    def delta(self) -> str:
        """What the first completion's text has gained since the request's last output."""
        return self.outputs[0].delta

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """How the first completion ended."""
        return self.outputs[0].finish_reason

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def error(self) -> str | None:
        """Why the request failed, if it did."""
        return next((output.error for output in self.outputs if output.error), None)


@dataclass(frozen=True)
class ScoreOutput:
    """How probable a text is to the model."""

    token_ids: tuple[int, ...]  # a continuation's at the end
    logprobs: tuple[TokenLogprobs, ...]  # of each token from the second on, or of the continuation's

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of these tokens, given those before them."""
        return sum(token.logprob for token in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; 1 where a text has only one token."""
        return exp(-self.logprob / len(self.logprobs)) if self.logprobs else 1.0

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives these tokens."""
        return all(token.rank == 1 for token in self.logprobs)


@dataclass(frozen=True)
class EmbeddingOutput:
    """A text as a vector."""

    token_ids: tuple[int, ...]  # that were computed: of pooling "first" one
    embedding: tuple[float, ...]  # [hidden]


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability in its place, as vLLM gives it."""

    logprob: float
    rank: int  # 1: the likeliest
    decoded_token: str | None  # None without a tokenizer


def logprob_dicts(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], tokenizer: Any = None
) -> list[dict[int, Logprob] | None]:
    """What is told of each token as vLLM gives it: {token id: Logprob}, of the token and of the likeliest ones.

    logprobs: of the last tokens of `token_ids`, or of all; None where nothing is told, as of a prompt's first token.
    """
    text = {} if tokenizer is None else _decoded(token_ids, logprobs, tokenizer)
    dicts: list[dict[int, Logprob] | None] = []
    for token_id, told in zip(token_ids[len(token_ids) - len(logprobs) :], logprobs, strict=True):
        if told is None:
            dicts.append(None)
            continue
        own = {token_id: Logprob(told.logprob, told.rank, text.get(token_id))}
        top = zip(told.top_ids, told.top_logprobs, strict=True)
        dicts.append(own | {i: Logprob(value, rank, text.get(i)) for rank, (i, value) in enumerate(top, start=1)} | own)
    return dicts


def _decoded(token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], tokenizer: Any) -> dict[int, str]:
    ids = {*token_ids}.union(*(told.top_ids for told in logprobs if told is not None))
    return {token_id: tokenizer.decode([token_id]) for token_id in ids}
