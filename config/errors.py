"""One mistake, one line: pydantic's validation errors retold as `InferenceConfig.tp_size: 0 is not valid: …`."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """A setting that its user can fix; the message names the field, its value and what would work."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that reads most like `name`."""
    return difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.0)[0]


def refuse_bool(model: type[BaseModel], value: Any, field: str) -> Any:
    """True is an int to Python; to a user it is a slip."""
    annotation = model.model_fields[field].annotation
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        raise ValueError("must not be true or false")
    return value


def one_line(error: ValidationError, model: type[BaseModel], origins: Mapping[str, str] | None = None) -> ConfigError:
    """`error` as a ConfigError; `origins` says where a field's value came from, where that is not the constructor."""
    return ConfigError("; ".join(_retell(detail, model, origins or {}) for detail in error.errors()))


# What a value should have been, by the first word of pydantic's error type (`int_parsing`, `float_type`, …).
_KINDS = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "is": "a list",  # is_instance_of: Sequence is the only abstract type in use
    "sequence": "a list",  # and no text, which would be one of letters
    "byte": "a number of bytes, such as 1073741824 or '2GiB'",
}
_BOUNDS = ("ge", "gt", "le")


def _retell(detail: ErrorDetails, model: type[BaseModel], origins: Mapping[str, str]) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # a rule between fields tells its own story
        return f"{model.__name__}: {message}"
    name, *indices = map(str, detail["loc"])
    path = f"{model.__name__}.{name}" + "".join(f"[{index}]" for index in indices)
    origin = origins.get(name, "constructor")
    suffix = "" if origin == "constructor" else f" ({origin})"
    if detail["type"] == "extra_forbidden":
        return f"{path}: unknown field; the nearest known one is {nearest(name, model.model_fields)}{suffix}"
    if detail["type"] != "value_error":
        message = "must be " + _expected(detail, model, name)
    return f"{path}: {reprlib.repr(detail['input'])} is not valid: {message}{suffix}"


def _expected(detail: ErrorDetails, model: type[BaseModel], name: str) -> str:
    context = detail.get("ctx", {})
    if "expected" in context:
        return f"one of {context['expected']}"
    bounds = {key: context[key] for key in _BOUNDS if key in context}
    for constraint in model.model_fields[name].metadata:
        bounds |= {key: getattr(constraint, key) for key in _BOUNDS if hasattr(constraint, key)}
    kind = _KINDS.get(detail["type"].split("_")[0], "" if bounds else f"valid: {detail['msg']}")
    return ", ".join(filter(None, (kind, _range(bounds))))


def _range(bounds: Mapping[str, Any]) -> str:
    """In words; every bounded field has a lower bound."""
    if not bounds:
        return ""
    low = bounds.get("ge", bounds.get("gt"))
    if "le" in bounds:
        return f"in {'[' if 'ge' in bounds else '('}{low}, {bounds['le']}]"
    return f"at least {low}" if "ge" in bounds else f"greater than {low}"
