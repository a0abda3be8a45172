"""What requests have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ....config import ConfigError, SamplingParams
from ..errors import ApiError

# Fields that OpenAI's clients may send and that mean nothing here: they are taken and left alone.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

OUR_SAMPLING = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "truncate_prompt_tokens",
    "priority",
    "best_of",
    "num_beams",
    "length_penalty",
    "structured_outputs",
)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # no padding is ever sent


class SamplingFields(BaseModel):
    """How tokens are drawn: OpenAI's fields, then ours."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: str | Sequence[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Mapping[str, float] | None = None
    user: str | None = None
    metadata: Mapping[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

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
    priority: int | None = None
    best_of: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    structured_outputs: Mapping[str, Any] | None = None

    def sampling_values(self) -> dict[str, Any]:
        """Fields of SamplingParams that are given here under the same name."""
        values = {name: getattr(self, name) for name in ("temperature", "top_p", "n", "seed", *OUR_SAMPLING)}
        values |= {"presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty}
        values["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.seed is not None and self.seed < 0:
            values["seed"] = self.seed % 2**63  # OpenAI's seeds are signed
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        return {name: value for name, value in values.items() if value is not None}


def _token_id(text: str) -> int:
    if not text.isdecimal():
        raise ApiError(400, f"Invalid key in 'logit_bias': {text!r} is not a token id", param="logit_bias")
    return int(text)


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """Raises ApiError, which names the field where it is one of the request's."""
    try:
        return SamplingParams(**values)
    except (ConfigError, TypeError) as error:
        raise as_bad_request(error) from None


def as_bad_request(error: Exception) -> ApiError:
    """Of a ValueError or TypeError of the engine's: its line, and the field that it names."""
    message = str(error).removeprefix("SamplingParams.")
    field = message.split(":")[0].split("=")[0].strip()
    code = "context_length_exceeded" if "max_model_len" in message and field.startswith("prompt") else None
    return ApiError(400, message, param=field if field.isidentifier() else None, code=code)


class Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, int] | None = None
