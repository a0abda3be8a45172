"""`SamplingParams`: how the tokens of one request are chosen, and when it ends."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import ConfigError, one_line, refuse_bool

TokenIds = Annotated[Sequence[Annotated[int, Field(ge=0, strict=True)]], AfterValidator(tuple)]

DEFAULT_MAX_TOKENS = 128
_SAMPLING = ("top_k", "top_p", "min_p")  # naming one of these, with no temperature, asks for sampling


class SamplingParams(BaseModel):
    """How the tokens of one request are chosen, and when it ends.

    A field that is left out, or None, takes the model's own generation config's value (`resolve`).
    Raises ConfigError, one line for one mistake.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, le=100, description="logits are divided by it; 0: greedy")
    top_k: int | None = Field(default=None, ge=0, description="sample among the k likeliest tokens; 0 or -1: among all")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="sample among the likeliest tokens that reach this probability together"
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="sample among tokens at least this times as probable as the likeliest"
    )
    seed: int | None = Field(
        default=None, ge=0, le=2**63 - 1, description="None: the engine's seed and the request decide"
    )

    max_tokens: int | None = Field(default=None, ge=1, description="output tokens at most")
    min_tokens: int = Field(default=0, ge=0, description="output tokens before an end token or a stop is heeded")
    max_total_tokens: int | None = Field(
        default=None, ge=1, description="prompt and output tokens at most; None: no limit"
    )
    stop: Sequence[str] = Field(default=(), description="strings that end the output")
    stop_token_ids: TokenIds = Field(default=(), description="token ids that end the output, beside the end tokens")
    eos_token_ids: TokenIds | None = Field(default=None, description="the end tokens' ids")
    ignore_eos: bool = Field(default=False, description="go on past end tokens")

    detokenize: bool = Field(default=True, description="give text beside token ids")
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")

    if not TYPE_CHECKING:  # type checkers see the field-by-field signature that pydantic declares

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise one_line(error, type(self)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_bool(cls, value, str(info.field_name))

    @field_validator("top_k", mode="before")
    @classmethod
    def _minus_one_is_off(cls, top_k: Any) -> Any:
        return 0 if top_k == -1 else top_k

    @field_validator("stop", mode="before")
    @classmethod
    def _one_string_is_a_list(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _no_empty_string(cls, stop: Sequence[str]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("must not hold an empty string")
        return tuple(stop)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop={list(self.stop)} is looked for in the text, but detokenize=False makes none")
        return self

    @classmethod
    def from_generation_config(cls, generation_config: Any, strict: bool = True) -> Self:
        """What transformers' `generate` does with this GenerationConfig.

        With `strict`, a setting that would change the output and is not supported raises ConfigError, and an unset
        `do_sample` leaves it to the model whether to sample. Without, for a model's own config, which is nobody's
        mistake here: what is not supported or not valid is left out, and an unset `do_sample` is greedy.
        """

        def get(name: str) -> Any:
            return getattr(generation_config, name, None)

        do_sample = get("do_sample") if strict else bool(get("do_sample"))
        if strict:
            _refuse_unsupported(get, sampling=do_sample is not False)
        values: dict[str, Any] = {
            "max_tokens": get("max_new_tokens"),
            "max_total_tokens": get("max_length") if get("max_new_tokens") is None else None,
            "min_tokens": get("min_new_tokens"),
            "stop": get("stop_strings"),
            "eos_token_ids": [eos] if isinstance(eos := get("eos_token_id"), int) else eos,
        }
        if do_sample is False:
            values["temperature"] = 0.0
        else:
            values |= {name: get(name) for name in ("temperature", *_SAMPLING)}
        if do_sample:  # the global defaults of transformers' generate
            values |= {name: value for name, value in _GENERATE_DEFAULTS.items() if values[name] is None}
        values = {name: value for name, value in values.items() if value is not None}
        return cls(**(values if strict else _valid_part(cls, values)))

    def resolve(self, defaults: "SamplingParams") -> "SamplingParams":
        """These params with every gap filled, from `defaults` (the model's own), else from the house's.

        No temperature given: the model's, if it samples; else 1 if top_k, top_p or min_p is given; else greedy.
        In the result only `seed` and `max_total_tokens` can be None.
        """
        mine, theirs = _given(self), _given(defaults)
        values = {**_FINAL_DEFAULTS, **theirs, **mine}
        if "temperature" not in mine:
            sampling = any(name in mine for name in _SAMPLING)
            values["temperature"] = theirs.get("temperature") or (1.0 if sampling else 0.0)
        # A limit of the caller's on the output replaces the model's, of whichever kind.
        if "max_tokens" in mine:
            values["max_total_tokens"] = mine.get("max_total_tokens")
        elif "max_total_tokens" in mine:
            values["max_tokens"] = mine["max_total_tokens"]
        # A default yields to what the caller asked for.
        if "max_tokens" not in mine:
            values["max_tokens"] = max(values["max_tokens"], mine.get("min_tokens", 1))
        if "min_tokens" not in mine:
            values["min_tokens"] = min(values["min_tokens"], values["max_tokens"])
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
    "max_tokens": DEFAULT_MAX_TOKENS,
    "min_tokens": 0,
    "eos_token_ids": (),
}

# transformers, GenerationConfig._get_default_generation_params
_GENERATE_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50}

# Settings of GenerationConfig that change the output and are not supported, each with the value that changes nothing.
_UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "sequence_bias": {},
    "constraints": [],
    "force_words_ids": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    "dola_layers": None,
    "token_healing": False,
    "max_time": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
}
_UNSUPPORTED_IN_SAMPLING: dict[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}


def _refuse_unsupported(get: Callable[[str], Any], sampling: bool) -> None:
    neutral = _UNSUPPORTED | (_UNSUPPORTED_IN_SAMPLING if sampling else {})
    if get("min_new_tokens") is None:  # which replaces min_length
        neutral = neutral | {"min_length": 0}
    problems = [
        f"GenerationConfig.{name}={get(name)!r} is not supported"
        for name, value in neutral.items()
        if get(name) is not None and get(name) != value
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _valid_part(cls: type[SamplingParams], values: Mapping[str, Any]) -> dict[str, Any]:
    valid: dict[str, Any] = {}
    for name, value in values.items():
        with suppress(ConfigError):
            cls(**valid, **{name: value})
            valid[name] = value
    return valid


def _given(params: SamplingParams) -> dict[str, Any]:
    return {name: value for name, value in params if name in params.model_fields_set and value is not None}
