"""What a request gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from .step import TokenLogprobs


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
    cumulative_logprob: float | None = None  # their sum
    error: str | None = None  # why, if finish_reason is "error"


@dataclass(frozen=True)
class RequestOutput:
    """A request's state so far; its end once `finished`."""

    request_id: str
    index: int  # which of the prompts of its `generate` or `stream`
    prompt: str | None  # None for a prompt given as token ids
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int  # prompt tokens whose keys and values were found in the prefix cache
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    timings: RequestTimings
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # of each prompt token; None for the first
    pooled: tuple[bytes, ...] = ()  # of `embed`: float32 [hidden], whose sum is that of the last hidden states

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

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # of each token from the second on

    @property
    def logprob(self) -> float:
        """Natural logarithm of the probability of all tokens after the first."""
        return sum(token.logprob for token in self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; 1 where there is only one token."""
        return exp(-self.logprob / len(self.logprobs)) if self.logprobs else 1.0


@dataclass(frozen=True)
class EmbeddingOutput:
    """A text as a vector."""

    token_ids: tuple[int, ...]
    embedding: Sequence[float]  # [hidden]
