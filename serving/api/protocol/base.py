"""What requests have in common."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ApiError

MAX_LOGPROBS = 20
_MAX_STOPS = 16  # OpenAI has 4; each is looked for with every token, in everybody's step
_LEAST_TOP_P = 1e-6  # takes the likeliest token, as OpenAI's 0 does


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False  # vLLM's: usage so far with every chunk
    include_obfuscation: bool | None = False  # no padding is ever sent


class SamplingFields(Body):
    """How tokens are drawn: OpenAI's fields, then ours."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: str | Annotated[Sequence[str], Field(max_length=_MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Mapping[str, float] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_tokens: int | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = Field(default=None, ge=0)  # a request may let others pass, and pass none itself
    best_of: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    structured_outputs: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises ApiError for what is not done, or not together."""
        if self.stream_options is not None and not self.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise ApiError(400, message, param="stream_options")
        if self.best_of is not None and self.best_of < (self.n or 1):
            message = f"Invalid 'best_of': {self.best_of} is below 'n', which is {self.n or 1}"
            raise ApiError(400, message, param="best_of", code="integer_below_min_value")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            message = "'best_of' above 'n' cannot be streamed: which are best is known in the end"
            raise ApiError(400, message, param="best_of")

    def sampling_values(self) -> dict[str, Any]:
        """Fields of SamplingParams that are given here."""
        values = {name: getattr(self, name) for name in _AS_THEY_ARE}
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["top_p"] = None if self.top_p is None else max(self.top_p, _LEAST_TOP_P)
        values["seed"] = None if self.seed is None else self.seed % 2**63  # OpenAI's seeds are signed
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def num_choices(self) -> int:
        """Outputs of each prompt, those that `best_of` leaves out included."""
        return max(self.n or 1, self.best_of or 1)

    @property
    def tells_usage(self) -> bool:
        """At a stream's end."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def tells_usage_so_far(self) -> bool:
        return self.tells_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


_OURS = tuple(SamplingFields.model_fields)[tuple(SamplingFields.model_fields).index("top_k") :]
_AS_THEY_ARE = ("temperature", "n", "presence_penalty", "frequency_penalty", *_OURS)


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"Invalid key in 'logit_bias': {text!r} is not a token id", param="logit_bias")
    return int(text)


def one_or_many(given: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[str | list[int]]:
    """Texts and lists of token ids, of which OpenAI's fields take one or several."""
    if isinstance(given, str):
        return [given]
    if not given or isinstance(given[0], int):
        return [list(given)]  # type: ignore[arg-type]
    return [each if isinstance(each, str) else list(each) for each in given]  # type: ignore[arg-type]
