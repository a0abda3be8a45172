"""`StructuredOutputsParams`: the language that a request's output must be a sentence of."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PydanticUserError,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import ConfigError, one_line

with warnings.catch_warnings():  # a field called `json`, as in vLLM, hides a deprecated method of pydantic's
    warnings.filterwarnings("ignore", 'Field name "json"', UserWarning)

    class StructuredOutputsParams(BaseModel):
        """What the output must be; exactly one field is given. Raises ConfigError, one line for one mistake.

        Whether a schema, an expression or a grammar can be compiled is known when it is: see `GrammarCompiler`.
        """

        model_config = ConfigDict(frozen=True, extra="forbid")

        json: str | None = Field(  # type: ignore[assignment]  # see above
            default=None,
            description="JSON that fulfils this schema, given as text, dict or pydantic model class; kept as text",
        )
        regex: str | None = Field(default=None, description="text that the whole of this regular expression matches")
        choice: Sequence[str] | None = Field(default=None, description="one of these texts")
        grammar: str | None = Field(
            default=None, description="text of this grammar: GBNF (rules by `::=`, from `root`) or Lark (`start:`)"
        )
        json_object: bool = Field(default=False, description="any JSON object")

        if not TYPE_CHECKING:

            def __init__(self, **values: Any) -> None:
                try:
                    super().__init__(**values)
                except ValidationError as error:
                    raise one_line(error, type(self)) from None

        else:  # `json` takes more than it keeps

            def __init__(
                self,
                *,
                json: str | Mapping[str, Any] | type[BaseModel] | None = None,
                regex: str | None = None,
                choice: Sequence[str] | None = None,
                grammar: str | None = None,
                json_object: bool = False,
            ) -> None: ...

        @field_validator("json", mode="before")
        @classmethod
        def _schema_as_text(cls, schema: Any) -> Any:
            return None if schema is None else _schema_text(schema)

        @field_validator("choice", mode="before")
        @classmethod
        def _one_string_is_no_list(cls, choice: Any) -> Any:
            if choice is not None and (isinstance(choice, str) or not isinstance(choice, Sequence)):
                raise ValueError("must be a list of strings")
            return choice

        @field_validator("choice")
        @classmethod
        def _some_choice(cls, choice: Sequence[str] | None) -> tuple[str, ...] | None:
            if choice is not None and (not choice or "" in choice):
                raise ValueError("must hold a string, and no empty one")
            return None if choice is None else tuple(choice)

        @field_validator("regex", "grammar")
        @classmethod
        def _not_empty(cls, text: str | None) -> str | None:
            if text == "":
                raise ValueError("must not be empty")
            return text

        @model_validator(mode="after")
        def _exactly_one(self) -> Self:
            given = [name for name, value in self if value not in (None, False)]
            if len(given) != 1:
                names = ", ".join(type(self).model_fields)
                raise ValueError(f"exactly one of {names} must be given, not {' and '.join(given) or 'none'}")
            return self

        @property
        def kind(self) -> str:
            """The name of the field that is given."""
            return next(name for name, value in self if value not in (None, False))


def as_structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """StructuredOutputsParams from itself, a mapping of its fields, or None."""
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    fields = list(StructuredOutputsParams.model_fields)
    if isinstance(value, Mapping) and (not value or not set(fields).isdisjoint(value)):
        return StructuredOutputsParams(**{str(name): given for name, given in value.items()})
    if isinstance(value, Mapping) or (isinstance(value, type) and issubclass(value, BaseModel)):
        raise ConfigError(f"must have one of the fields {', '.join(fields)}; a JSON schema is given as {{'json': …}}")
    raise ConfigError(f"must be StructuredOutputsParams, a dict of its fields or None, not {type(value).__name__}")


def _schema_text(schema: Any) -> str:
    """A JSON schema as text: hashable, and its properties in their order, which the output follows."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        try:
            schema = schema.model_json_schema()
        except PydanticUserError as error:  # of a field that JSON has no form for
            raise ValueError(f"has no JSON schema: {error.message}") from None
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(value, Mapping):
            raise ValueError("must be a JSON schema: an object as text, a dict or a pydantic model class")
        return json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise ValueError(f"must be JSON: {error}") from None
