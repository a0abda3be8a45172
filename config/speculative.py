"""`SpeculativeConfig`: who drafts tokens ahead of the model, and how many."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .errors import one_line, refuse_bool

# Fields that only one method reads, by how their names begin.
_OF_METHOD = {"model": "draft_model", "prompt_lookup_": "ngram", "suffix_": "suffix"}


class SpeculativeConfig(BaseModel):
    """Who drafts tokens ahead of the model, and how many: what is drawn stays the same, the number of steps falls.

    Raises ConfigError, one line for one mistake.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Literal["ngram", "suffix", "draft_model"] = Field(
        default="suffix",
        description="ngram: what followed the last tokens where they stood before in the same request; suffix: what "
        "most often followed them there and in other outputs; draft_model: a smaller model's tokens",
    )
    num_speculative_tokens: int = Field(
        default=5, ge=1, le=16, description="tokens drafted for a sequence in one step, at most"
    )
    adaptive: bool = Field(
        default=True,
        description="draft fewer, or none, where measured acceptance does not pay for more; false: always that many",
    )

    model: str | None = Field(default=None, description="draft_model: path of the smaller model; the same vocabulary")
    prompt_lookup_min: int = Field(default=2, ge=1, le=16, description="ngram: tokens that must agree, at least")
    prompt_lookup_max: int = Field(default=4, ge=1, le=16, description="ngram: tokens that are compared, at most")
    suffix_min_probability: float = Field(
        default=0.2, gt=0, le=1, description="suffix: a draft ends before its estimated probability is less than this"
    )
    suffix_max_cached_tokens: int = Field(
        default=100_000, ge=0, description="suffix: tokens of finished outputs that are kept to draft from; 0: none"
    )

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

    @field_validator("model", mode="before")
    @classmethod
    def _path_as_string(cls, model: Any) -> Any:
        return os.fspath(model) if isinstance(model, os.PathLike) else model

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        for name, field in type(self).model_fields.items():
            method = next((of for beginning, of in _OF_METHOD.items() if name.startswith(beginning)), self.method)
            if method != self.method and getattr(self, name) != field.default:
                raise ValueError(f"{name}={getattr(self, name)!r} needs method={method!r}, not {self.method!r}")
        if self.method == "draft_model" and not self.model:
            raise ValueError(f"method='draft_model' needs the path of a smaller model, and model={self.model!r}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} is more than prompt_lookup_max={self.prompt_lookup_max}"
            )
        return self


def as_speculative_config(value: Any) -> SpeculativeConfig | None:
    """From the forms that a caller may give: a SpeculativeConfig, a method's name, a dict of fields, or None."""
    if value is None or isinstance(value, SpeculativeConfig):
        return value
    if isinstance(value, str):
        return SpeculativeConfig(method=value)  # type: ignore[arg-type]  # pydantic refuses one that is not known
    if isinstance(value, Mapping):
        return SpeculativeConfig(**value)
    raise TypeError(
        f"speculative: a {type(value).__name__} is no SpeculativeConfig, method's name or dict of its fields"
    )
