"""Qwen 3 Coder: arguments as they are, each between tags.

<tool_call>
<function=weather>
<parameter=city>
Bern
</parameter>
</function>
</tool_call>
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .format import Tool, ToolFormat, Tools
from .lark import Lark
from .reader import Arguments, Call, Markers, Reader, Reading, Text

_OPENING, _FUNCTION, _PARAMETER = "<tool_call>", "<function=", "<parameter="
_END, _FUNCTION_END, _PARAMETER_END = "</tool_call>", "</function>", "</parameter>"
_OPENINGS = Markers([_OPENING, _FUNCTION])
_VALUE_ENDS = Markers(
    [new_line + tag for tag in (_PARAMETER_END, _PARAMETER, _FUNCTION_END) for new_line in ("", "\n")]
)
_NAME = re.compile(r"[^\s<>]*")
_NEW_LINE = "\n"


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    while opening := (yield from reader.up_to(_OPENINGS)):
        before = reader.at
        if opening == _OPENING:
            yield from reader.space()
            if not (yield from reader.literal(_FUNCTION)):
                reader.at = before
                yield Text(opening)
                continue
        name = yield from reader.run(_NAME)
        if not name or not (yield from reader.literal(">")):
            reader.at = before
            yield Text(opening)
            continue
        yield Call(name)
        yield from _parameters(reader, tools.get(name, Tool(name)))
        before = reader.at
        yield from reader.space()
        if not (yield from reader.literal(_END)):
            reader.at = before


def _parameters(reader: Reader, tool: Tool) -> Reading[None]:
    """Up to the function's end. Where the text breaks off so do the arguments."""
    begin = "{"
    while True:
        yield from reader.space()
        if not (yield from reader.literal(_PARAMETER)):
            break
        name = yield from reader.run(_NAME)
        if not (yield from reader.literal(">")):
            break
        yield from reader.literal("\n")
        yield Arguments(f"{begin}{json.dumps(name, ensure_ascii=False)}: ")
        begin = ", "
        schema = tool.properties.get(name, ({}, False))[0]
        end = yield from (_string(reader) if _is_text(schema) else _literal(reader))
        if end is None:
            return
        if not end.endswith(_PARAMETER_END):  # it was left out
            reader.at -= len(end)
    closed = yield from reader.literal(_FUNCTION_END)
    if closed or not (yield from reader.breaks_off_in(_PARAMETER, _FUNCTION_END)):
        yield Arguments("{}" if begin == "{" else "}")


def _string(reader: Reader) -> Reading[str | None]:
    def escaped(text: str) -> Arguments:
        return Arguments(json.dumps(text, ensure_ascii=False)[1:-1])

    yield Arguments('"')
    end = yield from reader.up_to(_VALUE_ENDS, escaped, keeps_begun=False)
    if end is not None:
        yield Arguments('"')
    return end


def _literal(reader: Reader) -> Reading[str | None]:
    """Of JSON, or of Python; what is neither is a string."""
    parts: list[str] = []
    end = yield from reader.up_to(_VALUE_ENDS, parts.append)
    if end is not None:
        yield Arguments(_as_json("".join(parts).strip()))
    return end


def _as_json(text: str) -> str:
    for parse in (json.loads, ast.literal_eval):
        try:
            return json.dumps(parse(text), ensure_ascii=False, allow_nan=False)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
    return json.dumps(text, ensure_ascii=False)


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value is a string whatever it reads like; so it is where nothing is said."""
    kind = schema.get("type")
    return kind == "string" or not (kind or schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "enum", "const"})


def _write(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return lark.one_of([_written(lark, tool) for tool in tools])


def _written(lark: Lark, tool: Tool) -> str:
    if not tool.is_plain:
        raise tool.refuse("a schema that is more than properties", QWEN3_CODER.name)
    parts = [lark.literal(f"\n{_FUNCTION}{tool.name}>\n")]
    for name, (schema, required) in tool.properties.items():
        if _NAME.fullmatch(name):
            value = _value(lark, tool, schema)
            parameter = lark.rule(f"{lark.literal(f'{_PARAMETER}{name}>{_NEW_LINE}')} {value}")
            parts.append(parameter if required else f"{parameter}?")
        elif required:
            raise tool.refuse(f"the parameter '{name}', which does not fit into a tag,", QWEN3_CODER.name)
    return lark.rule(" ".join([*parts, lark.literal(f"{_FUNCTION_END}\n{_END}")]))


def _value(lark: Lark, tool: Tool, schema: dict[str, Any]) -> str:
    """With the end of its tag."""
    end = f"\n{_PARAMETER_END}\n"
    if not _is_text(schema):
        return f"{lark.json(schema, lenient=not tool.is_strict)} {lark.literal(end)}"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices:
        return f"{lark.one_of([lark.literal(str(choice)) for choice in choices])} {lark.literal(end)}"
    if tool.is_strict and (unsaid := schema.keys() & {"pattern", "format", "minLength", "maxLength"}):
        raise tool.refuse(f"'{min(unsaid)}' of a string", QWEN3_CODER.name)
    return lark.up_to(end)


QWEN3_CODER = ToolFormat(
    "qwen3_coder",
    _read,
    _write,
    opening=_OPENING,
    separator="\n",
    suits=lambda template, tokens: _FUNCTION in template and _PARAMETER in template,
    markers=(_OPENING, _END, _FUNCTION_END, _PARAMETER_END),
)
