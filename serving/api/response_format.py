"""What a response's format, `response_format` or `text.format`, means for the tokens that are drawn."""

from collections.abc import Mapping
from typing import Any

from .errors import ApiError

_TYPES = ("json_object", "json_schema", "text")


def structured_outputs(form: Mapping[str, Any] | None, param: str = "response_format") -> dict[str, Any] | None:
    """A dict of StructuredOutputsParams; None for text. Raises ApiError.

    The schema is beside the type, as in /v1/responses, or in `json_schema`, as in /v1/chat/completions.
    """
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_object":
        return {"json_object": True}
    if "type" not in form:
        raise _missing(f"{param}.type")
    if form["type"] != "json_schema":
        supported = ", ".join(map(repr, _TYPES))
        message = f"Invalid value: {form['type']!r}. Supported values are: {supported}."
        raise ApiError(400, message, param=f"{param}.type", code="invalid_value")
    if param == "response_format":
        form, param = form.get("json_schema") or {}, f"{param}.json_schema"
        if not isinstance(form, Mapping) or not form:
            raise _missing(param)
    if not isinstance(form.get("name"), str):
        raise _missing(f"{param}.name")
    if not isinstance(form.get("schema"), Mapping):
        raise _missing(f"{param}.schema")
    return {"json": form["schema"]}


def _missing(param: str) -> ApiError:
    return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
