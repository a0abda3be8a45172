"""JSON schemas at random, and whether a text fulfils one; pytest finds this module by its `pythonpath`."""

import json
import random
import string
from typing import Any

import jsonschema

FORMATS = jsonschema.FormatChecker(["uuid", "ipv4", "email"])  # of dates it wants the years that Python has


def check_json(text: str, schema: dict[str, Any]) -> None:
    """Raises AssertionError."""
    try:
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"{json.dumps(schema, ensure_ascii=False)}\n{text!r}\n{error}") from None


def a_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    scalars = [_string, _string, _integer, _number, _other]
    return rng.choice(scalars if depth > 2 else [*scalars, _object, _object, _array, _any_of])(rng, depth)


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 4)
    return rng.choice(
        [
            {"type": "string"},
            {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)},
            {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", "é+", "^(日本|\\d+)-x", "^$|^q"])},
            {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "ipv4", "email"])},
        ]
    )


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-500, 500)
    bounds = {"minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(20, 5000)}
    return {"type": "integer", **rng.choice([{}, bounds, {"multipleOf": rng.randint(2, 9)}])}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = round(rng.uniform(-10, 10), 2)
    return {"type": "number", **rng.choice([{}, {"exclusiveMinimum": low, "maximum": low + 3.5}])}


def _other(rng: random.Random, depth: int) -> dict[str, Any]:
    values = ["é😀", 'q"\\', "", 7, -2.5, None, True, [1, {"k": "v"}], {"x": []}]
    return rng.choice(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"const": rng.choice(values)},
            {"enum": rng.sample(values, 3)},
            {"type": rng.sample(["string", "integer", "null", "boolean", "array", "object"], 2)},
        ]
    )


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_letters + 'é日 "\\/_', k=rng.randint(1, 6)))


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    properties = {_name(rng): a_schema(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = [name for name in properties if rng.random() < 0.6]
    if rng.random() < 0.7:
        schema["additionalProperties"] = rng.choice([False, a_schema(rng, 3)])
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    schema: dict[str, Any] = {"type": "array", "items": a_schema(rng, depth + 1)}
    if rng.random() < 0.6:
        schema |= {"minItems": low, "maxItems": low + rng.randint(0, 3)}
    if rng.random() < 0.3:
        schema["prefixItems"] = [a_schema(rng, depth + 1)]
    return schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [a_schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]}


def a_whole_schema(rng: random.Random) -> dict[str, Any]:
    """One in four is recursive, or of kinds that a tag tells apart."""
    if rng.random() < 0.75:
        return a_schema(rng)
    if rng.random() < 0.5:
        node = {
            "type": "object",
            "properties": {"v": a_schema(rng, 2), "next": {"$ref": "#/$defs/n"}},
            "required": ["v"],
        }
        return {"$ref": "#/$defs/n", "$defs": {"n": {"anyOf": [{"type": "null"}, node]}}}
    kinds = [{"kind": {"const": tag}, "x": a_schema(rng, 2)} for tag in "ab"]
    return {"oneOf": [{"type": "object", "properties": p, "required": ["kind", "x"]} for p in kinds]}
