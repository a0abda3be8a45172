"""Hermes, Qwen 2.5 and 3, Granite 4, SmolLM 3 and many more.

<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
"""

from collections.abc import Sequence

from .format import Tool, ToolFormat, Tools
from .json_calls import json_call
from .lark import Lark
from .reader import Markers, Reader, Reading, Text

_OPENING, _END = "<tool_call>", "</tool_call>"
_OPENINGS, _ENDS = Markers([_OPENING]), Markers([_END])


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    while (yield from reader.up_to(_OPENINGS)):
        before = reader.at
        yield from reader.space()
        if not (yield from json_call(reader, end=_ENDS)):
            reader.at = before
            yield Text(_OPENING)


def _write(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return lark.one_of([named_json(lark, tool, "\n", f"\n{_END}") for tool in tools])


def named_json(lark: Lark, tool: Tool, before: str, after: str, arguments: str = "arguments") -> str:
    """A call as a JSON object, as models space it."""
    head = lark.literal(f'{before}{{"name": "{tool.name}", "{arguments}": ')
    return lark.rule(f"{head} {lark.json(tool.schema, lenient=not tool.is_strict)} {lark.literal('}' + after)}")


HERMES = ToolFormat(
    "hermes",
    _read,
    _write,
    opening=_OPENING,
    separator="\n",
    suits=lambda template, tokens: _OPENING in template,
    markers=(_OPENING, _END),
)
