import pickle
import reprlib
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from meshlm.config import ConfigError, StructuredOutputsParams
from meshlm.config.structured import as_structured_outputs


class Point(BaseModel):
    x: int


class Undescribed(BaseModel):
    call: Callable[[], int]


ONE_OF = "StructuredOutputsParams: exactly one of json, regex, choice, grammar, json_object must be given, not"
SCHEMA_KINDS = "must be a JSON schema: an object as text, a dict or a pydantic model class"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, f"{ONE_OF} none"),
        ({"json_object": False}, f"{ONE_OF} none"),
        ({"regex": "a", "choice": ["b"]}, f"{ONE_OF} regex and choice"),
        ({"json": True}, f"StructuredOutputsParams.json: True is not valid: {SCHEMA_KINDS}"),
        ({"json": "[1]"}, f"StructuredOutputsParams.json: '[1]' is not valid: {SCHEMA_KINDS}"),
        (
            {"json": {"a": {1}}},
            "StructuredOutputsParams.json: {'a': {1}} is not valid: must be JSON: Object of type set",
        ),
        (
            {"json": Undescribed},
            f"StructuredOutputsParams.json: {reprlib.repr(Undescribed)} is not valid: has no JSON ",
        ),
        ({"json": "{"}, "StructuredOutputsParams.json: '{' is not valid: must be JSON: Expecting property name"),
        ({"regex": ""}, "StructuredOutputsParams.regex: '' is not valid: must not be empty"),
        ({"choice": "ab"}, "StructuredOutputsParams.choice: 'ab' is not valid: must be a list of strings"),
        ({"choice": []}, "StructuredOutputsParams.choice: [] is not valid: must hold a string, and no empty one"),
        ({"choice": [1]}, "StructuredOutputsParams.choice[0]: 1 is not valid: must be a string"),
        ({"grammer": "a"}, "StructuredOutputsParams.grammer: unknown field; the nearest known one is grammar"),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        StructuredOutputsParams(**values)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "kind", "kept"),
    [
        ({"json": Point}, "json", None),
        ({"json": {"type": "object", "b": 1, "a": 2}}, "json", '{"type": "object", "b": 1, "a": 2}'),
        ({"json": '{"title":"é"}'}, "json", '{"title": "é"}'),
        ({"json": {}}, "json", "{}"),
        ({"choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"json_object": True}, "json_object", True),
    ],
)
def test_values_are_normalised_and_hashable(values: dict[str, Any], kind: str, kept: Any) -> None:
    params = StructuredOutputsParams(**values)
    assert params.kind == kind and (kept is None or getattr(params, kind) == kept)
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))
    assert as_structured_outputs(params) is params
    assert as_structured_outputs(values) == params == StructuredOutputsParams.model_validate(params.model_dump())


def test_what_else_cannot_be_structured_outputs() -> None:
    assert as_structured_outputs(None) is None
    with pytest.raises(ConfigError, match="a dict of its fields or None, not str"):
        as_structured_outputs("json")
    fields = "must have one of the fields json, regex, choice, grammar, json_object; a JSON schema is given as {'json'"
    for value in (Point, {"type": "object"}, {1: 2}):
        with pytest.raises(ConfigError, match=fields):
            as_structured_outputs(value)
    with pytest.raises(ConfigError, match=r"StructuredOutputsParams\.1: unknown field"):
        as_structured_outputs({"regex": "a", 1: 2})
