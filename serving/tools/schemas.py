"""What of a JSON schema an output cannot be held to, token by token."""

from collections.abc import Iterator, Mapping
from typing import Any

# Of the library that compiles schemas; see docs/sampling.md, "Structured output".
_NEVER = frozenset(
    {
        *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
        *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$dynamicAnchor", "$recursiveRef"),
    }
)
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_ALONE = ("items", "additionalProperties")

Context = tuple[str | int, ...]


def why_unenforceable(schema: Any) -> str | None:
    """In OpenAI's words; what is found only when the schema is compiled is told then."""
    waiting: list[tuple[Any, Context]] = [(schema, ())]
    while waiting:
        part, context = waiting.pop()
        if isinstance(part, Mapping):
            if found := sorted(_NEVER.intersection(part)):
                return f"In context={context}, '{found[0]}' is not permitted."
            waiting += _parts(part, context)
    return None


def _parts(schema: Mapping[str, Any], context: Context) -> Iterator[tuple[Any, Context]]:
    for key, value in schema.items():
        if key in _ALONE:
            yield value, (*context, key)
        elif key in _BY_NAME and isinstance(value, Mapping):
            yield from ((part, (*context, key, name)) for name, part in value.items())
        elif key in _IN_LISTS and isinstance(value, list):
            yield from ((part, (*context, key, index)) for index, part in enumerate(value))
