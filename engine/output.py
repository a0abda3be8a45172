"""What a request gives back."""

from dataclasses import dataclass


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
    finish_reason: str | None  # "stop", "length", "abort"; None while it goes on


@dataclass(frozen=True)
class RequestOutput:
    """A request's state so far; its end once `finished`."""

    request_id: str
    index: int  # which of the prompts of its `generate` or `stream`
    prompt: str | None  # None for a prompt given as token ids
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int  # prompt tokens whose keys and values were found in the prefix cache
    outputs: tuple[CompletionOutput, ...]
    delta: str  # what `text` has gained since the request's last output
    finished: bool
    timings: RequestTimings

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
