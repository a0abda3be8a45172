"""`SamplingParams`: how the tokens of one request are chosen, and when it ends. docs/sampling.md tells more."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .contradictions import contradictions
from .errors import ConfigError, one_line, refuse_bool
from .generation_config import SAMPLING, read_generation_config
from .logits_processors import LogitsProcessor, as_logits_processors
from .structured import StructuredOutputsParams, as_structured_outputs
from .token_ids import TokenBias, TokenIds, Words, not_empty

DEFAULT_MAX_TOKENS = 128
MAX_NUM_OUTPUTS = 16384  # of one request
_LARGEST = 2**31 - 1  # of what ranks compute with


class SamplingParams(BaseModel):
    """How the tokens of one request are chosen, and when it ends.

    A field that is left out, or None, takes the model's own generation config's value (`resolve`).
    Raises ConfigError, one line for one mistake.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, le=100, description="logits are divided by it; 0: greedy")
    top_k: int | None = Field(
        default=None, ge=0, le=_LARGEST, description="sample among the k likeliest tokens; 0 or -1: among all"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="sample among the likeliest tokens that reach this probability together"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="sample among tokens at least this times as probable as the likeliest"
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**63 - 1, description="None: the engine's seed and the request decide"
    )

    n: int = Field(default=1, ge=1, le=MAX_NUM_OUTPUTS, description="outputs")
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_NUM_OUTPUTS, description="so many are sampled, the n likeliest given; None: n"
    )
    num_beams: int = Field(default=1, ge=1, description="of beam search; 1: off")
    length_penalty: float | None = Field(
        default=None, description="a beam's log-probability is divided by its output's length to the power of this"
    )
    early_stopping: bool | Literal["never"] | None = Field(
        default=None, description="end with num_beams ended beams (True), when better ones are unlikely, impossible"
    )

    max_tokens: int | None = Field(default=None, ge=1, description="output tokens at most")
    min_tokens: int = Field(default=0, ge=0, description="output tokens before an end token or a stop is heeded")
    max_total_tokens: int | None = Field(
        default=None, ge=1, description="prompt and output tokens at most; None: no limit"
    )
    stop: Sequence[str] = Field(default=(), description="strings that end the output")
    include_stop_str_in_output: bool = Field(default=False, description="the text ends after the stop string")
    stop_token_ids: TokenIds = Field(default=(), description="token ids that end the output, beside the end tokens")
    eos_token_ids: TokenIds | None = Field(default=None, description="the end tokens' ids")
    ignore_eos: bool = Field(default=False, description="go on past end tokens")

    repetition_penalty: float | None = Field(
        default=None, gt=0, description="logits of tokens in prompt or output: divided by it above 0, else multiplied"
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logits of tokens in the output"
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="subtracted from the logits of tokens as often as they are in the output"
    )
    no_repeat_ngram_size: int | None = Field(
        default=None, ge=0, le=_LARGEST, description="no n-gram comes twice; 0: off"
    )
    logit_bias: TokenBias | None = Field(default=None, description="token id -> what is added to its logit")
    bad_words: Words | None = Field(default=None, description="strings, or lists of token ids, that are never output")
    suppress_tokens: TokenIds | None = Field(default=None, description="token ids that are never output")
    begin_suppress_tokens: TokenIds | None = Field(default=None, description="token ids that no output begins with")
    allowed_token_ids: Annotated[TokenIds, AfterValidator(not_empty)] | None = Field(
        default=None, description="no other token ids are output"
    )
    logits_processors: Annotated[Sequence[LogitsProcessor], BeforeValidator(as_logits_processors)] = Field(
        default=(), description="f(prompt_token_ids, output_token_ids, logits [vocab_size]) -> logits"
    )
    structured_outputs: Annotated[StructuredOutputsParams | None, BeforeValidator(as_structured_outputs)] = Field(
        default=None, description="what the output must be: JSON, a regular expression, a grammar, a choice"
    )
    forced_token_ids: Annotated[TokenIds, AfterValidator(not_empty)] | None = Field(
        default=None, description="the output begins with these, whatever they are; stops are heeded from the last on"
    )

    logprobs: int | None = Field(default=None, ge=-1, description="likeliest tokens to tell of for each; -1: all")
    prompt_logprobs: int | None = Field(default=None, ge=-1, description="the same for each token of the prompt")
    detokenize: bool = Field(default=True, description="give text beside token ids")
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="keep the prompt's last tokens; -1: as many as leave room for max_tokens"
    )
    priority: int = Field(default=0, description="requests of a lower one are served earlier")

    if not TYPE_CHECKING:  # type checkers see the field-by-field signature that pydantic declares

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise one_line(error, type(self)) from None

    @model_validator(mode="before")
    @classmethod
    def _none_is_left_out(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}

    def __hash__(self) -> int:
        return hash(tuple(frozenset(value.items()) if isinstance(value, dict) else value for _, value in self))

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_bool(cls, value, str(info.field_name))

    @field_validator("top_k", mode="before")
    @classmethod
    def _minus_one_is_off(cls, top_k: Any) -> Any:
        return 0 if top_k == -1 else top_k

    @field_validator("early_stopping", mode="before")
    @classmethod
    def _bool_or_never(cls, value: Any) -> Any:
        if value is not None and value != "never" and not isinstance(value, bool):
            raise ValueError("must be true, false or 'never'")
        return value

    @field_validator("stop", "bad_words", mode="before")
    @classmethod
    def _one_string_is_a_list(cls, strings: Any) -> Any:
        return (strings,) if isinstance(strings, str) else strings

    @field_validator("stop")
    @classmethod
    def _no_empty_string(cls, stop: Sequence[str]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("must not hold an empty string")
        return tuple(stop)

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _keeps_a_token(cls, number: int | None) -> int | None:
        if number == 0:
            raise ValueError("must be at least 1, or -1 for as many as leave room for max_tokens")
        return number

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        for message in contradictions(self):
            raise ValueError(message)
        return self

    @classmethod
    def from_generation_config(cls, generation_config: Any, strict: bool = True) -> Self:
        """What transformers' `generate` does with this GenerationConfig.

        With `strict`, a setting that would change the output and is not supported raises ConfigError, and an unset
        `do_sample` leaves it to the model whether to sample. Without, for a model's own config, which is nobody's
        mistake here: what is not supported or not valid is left out, and an unset `do_sample` is greedy.
        """
        values = read_generation_config(generation_config, strict)
        return cls(**(values if strict else _valid_part(cls, values)))

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """These params with every gap filled, from `defaults` (the model's own), else from the house's.

        No temperature given: 0 with beams; else the model's, if it samples; else 1 if top_k, top_p or min_p is given;
        else greedy. In the result a field is None only where that is a value of its own.
        """
        mine, theirs = _given(self), _given(defaults)
        values = {**_FINAL_DEFAULTS, **theirs, **mine}
        if "temperature" not in mine and self.num_beams > 1:
            values["temperature"] = 0.0
        elif "temperature" not in mine:
            sampling = any(name in mine for name in SAMPLING)
            values["temperature"] = theirs.get("temperature") or (1.0 if sampling else 0.0)
        # A limit of the caller's on the output replaces the model's, of whichever kind.
        if "max_tokens" in mine:
            values["max_total_tokens"] = mine.get("max_total_tokens")
        elif "max_total_tokens" in mine:
            values["max_tokens"] = mine["max_total_tokens"]
        # A default yields to what the caller asked for.
        if "max_tokens" not in mine:
            at_least = max(mine.get("min_tokens", 1), len(self.forced_token_ids or ()))
            values["max_tokens"] = max(values["max_tokens"], at_least)
        if "min_tokens" not in mine:
            most = min(values["max_tokens"], (values.get("max_total_tokens") or _LARGEST) - 1)
            values["min_tokens"] = 0 if self.structured_outputs else min(values["min_tokens"], most)
        if not self.detokenize:
            values["stop"] = ()
        return SamplingParams(**values)


def as_sampling_params(value: Any) -> SamplingParams:
    """SamplingParams from SamplingParams, a mapping of its fields, transformers' GenerationConfig, or None."""
    if value is None:
        return SamplingParams()
    if isinstance(value, SamplingParams):
        return value
    if isinstance(value, Mapping):
        return SamplingParams(**value)
    if hasattr(value, "do_sample") and hasattr(value, "max_new_tokens"):
        return SamplingParams.from_generation_config(value)
    kind = type(value).__name__
    raise TypeError(f"sampling params must be SamplingParams, GenerationConfig, a dict or None, not {kind}")


_FINAL_DEFAULTS: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "max_tokens": DEFAULT_MAX_TOKENS,
    "min_tokens": 0,
    "eos_token_ids": (),
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": {},
    "bad_words": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
}


def _valid_part(cls: type[SamplingParams], values: Mapping[str, Any]) -> dict[str, Any]:
    valid: dict[str, Any] = {}
    for name, value in values.items():
        with suppress(ConfigError):
            cls(**valid, **{name: value})
            valid[name] = value
    return valid


def _given(params: SamplingParams) -> dict[str, Any]:
    return {name: value for name, value in params if name in params.model_fields_set and value is not None}
