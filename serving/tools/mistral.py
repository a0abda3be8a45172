"""Mistral: a list of JSON objects, and from version 11 of its tokenizers on a name and arguments for each call.

[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}]
[TOOL_CALLS]weather[ARGS]{"city": "Bern"}
"""

import re
from collections.abc import Sequence

from .format import Tool, ToolFormat, Tools
from .json_calls import json_calls
from .lark import Lark
from .lists import write_list
from .reader import Arguments, Call, Markers, Reader, Reading, Text

_OPENING, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_OPENINGS = Markers([_OPENING])
_NAME = re.compile(r"[\w.-]*")


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    while (yield from reader.up_to(_OPENINGS)):
        before = reader.at
        yield from reader.space()
        if not ((yield from json_calls(reader)) or (yield from _named_call(reader))):
            reader.at = before
            yield Text(_OPENING)


def _named_call(reader: Reader) -> Reading[bool]:
    name = yield from reader.run(_NAME)
    if (yield from reader.literal(_ID)):
        yield from reader.run(_NAME)
    yield from reader.literal(_ARGS)
    yield from reader.space()
    if not name or (yield from reader.peek()) != "{":
        return False
    yield Call(name)
    if not (yield from reader.value(Arguments)) and (yield from reader.up_to(_OPENINGS, Arguments)):
        reader.at -= len(_OPENING)
    return True


def _write_list(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return f'" "? {write_list(lark, tools, several)}'


def _write_named(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    def call(tool: Tool) -> str:
        return lark.rule(f"{lark.literal(tool.name + _ARGS)} {lark.json(tool.schema, lenient=not tool.is_strict)}")

    return lark.one_of([call(tool) for tool in tools])


MISTRAL = ToolFormat(
    "mistral",
    _read,
    _write_list,
    opening=_OPENING,
    separator=None,
    suits=lambda template, tokens: _OPENING in template,
    markers=(_OPENING,),
)
MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    _read,
    _write_named,
    opening=_OPENING,
    separator="",
    suits=lambda template, tokens: _OPENING in template and _ARGS in template,
    markers=(_OPENING, _ARGS, _ID),
)
