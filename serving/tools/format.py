"""What a format of tool calls is, and the tools that calls are of."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .lark import Lark
from .reader import Reader, Reading
from .schemas import why_unenforceable

_NOT_PLAIN = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties", "minProperties", "maxProperties")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # a JSON schema
    is_strict: bool = False  # its arguments fulfil the schema, whatever the schema has in it

    @property
    def schema(self) -> dict[str, Any]:
        """Of an object, even if its author has not said so; with no more properties, unless he has said so."""
        declared = self.parameters.get("properties") or {}
        closed = self.is_plain and all(name in declared for name in self.parameters.get("required") or ())
        return {"type": "object", **({"additionalProperties": False} if closed else {}), **self.parameters}

    @property
    def properties(self) -> dict[str, tuple[dict[str, Any], bool]]:
        """Of each parameter: its schema, which stands by itself, and whether it is required."""
        shared = {name: self.parameters[name] for name in ("$defs", "definitions") if name in self.parameters}
        required = self.parameters.get("required") or ()
        return {
            name: ({**schema, **shared} if isinstance(schema, Mapping) else {}, name in required)
            for name, schema in (self.parameters.get("properties") or {}).items()
        }

    def why_invalid(self) -> str | None:
        """Why the schema is none of an object's properties, or cannot be held to where it must be."""
        kind, declared = self.parameters.get("type", "object"), self.parameters.get("properties") or {}
        required = self.parameters.get("required") or []
        if kind != "object":
            return f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {json.dumps(kind)}'."
        if not isinstance(declared, Mapping):
            return "'properties' must be an object"
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            return "'required' must be an array of strings"
        return why_unenforceable(self.parameters) if self.is_strict else None

    @property
    def is_plain(self) -> bool:
        """Whether its `properties` are all that is to be said of the arguments."""
        return not any(name in self.parameters for name in _NOT_PLAIN)

    def refuse(self, what: str, format_name: str) -> ValueError:
        return ValueError(
            f"the function '{self.name}': {what} cannot be enforced where calls are written as this model's are "
            f"({format_name}); write the schema otherwise, or leave out 'strict' and leave 'tool_choice' at 'auto'"
        )


Tools = Mapping[str, Tool]


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Calls begin with `opening`; `write` gives the expression of all that follows it: of one call, or of a list of them
    where `separator` is None and there may be several; else each has its own opening, with the separator before it.
    """

    name: str
    read: Callable[[Reader, Tools], Reading[None]]
    write: Callable[[Lark, Sequence[Tool], bool], str] | None  # None: calls cannot be asked for
    opening: str
    separator: str | None
    suits: Callable[[str, Mapping[str, int]], bool]  # a chat template, and the model's added tokens
    markers: tuple[str, ...] = ()  # what it is told by: must stand in the text, be it special tokens
    closing: str = ""  # of a list of calls
    is_bare: bool = False  # prose has the opening in it too
