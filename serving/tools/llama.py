"""Llama 3: a JSON object and nothing around it, `;` between two. Some put <|python_tag|> first.

{"name": "weather", "parameters": {"city": "Bern"}}
"""

import re
from collections.abc import Mapping, Sequence

from .format import Tool, ToolFormat, Tools
from .json_calls import json_call
from .lark import Lark
from .reader import Markers, Reader, Reading, Text

_TAG = "<|python_tag|>"
_OPENINGS = Markers([_TAG, "{"])
_BETWEEN = re.compile(r"[\s;,]*")


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    """An object is a call if it names a tool: all others are text, as JSON may well be."""
    while opening := (yield from reader.up_to(_OPENINGS)):
        before = reader.at
        if opening == "{":
            reader.at -= 1
        else:
            yield from reader.space()
        if not (yield from json_call(reader, lambda name: name in tools)):
            reader.at = before
            yield Text(opening)
            continue
        before = reader.at
        yield from reader.run(_BETWEEN)
        if (yield from reader.peek()) != "{":
            reader.at = before


def _write(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    def rest(tool: Tool) -> str:
        head = lark.literal(f'"name": "{tool.name}", "parameters": ')
        return lark.rule(f'{head} {lark.json(tool.schema, lenient=not tool.is_strict)} "}}"')

    return lark.one_of([rest(tool) for tool in tools])


def _suits(template: str, tokens: Mapping[str, int]) -> bool:
    return _TAG in tokens or _TAG in template or '"parameters": dictionary' in template


LLAMA3_JSON = ToolFormat("llama3_json", _read, _write, opening="{", separator="; ", suits=_suits, is_bare=True)
