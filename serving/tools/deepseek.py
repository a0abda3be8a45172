"""DeepSeek V3, R1 and V3.1, whose calls have tags of their own.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather
    ```json
    {"city": "Bern"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 has no kind and no fence: `<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Bern"}<｜tool▁call▁end｜>`.
"""

import re
from collections.abc import Sequence

from .format import Tool, ToolFormat, Tools
from .lark import Lark
from .reader import Arguments, Call, Markers, Reader, Reading, Text

_ALL, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _SEPARATOR, _ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_OPENINGS, _ENDS = Markers([_ALL, _ONE]), Markers([_ONE_END, _ALL_END])
_NAME = re.compile(r"[\w.-]*")


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    while opening := (yield from reader.up_to(_OPENINGS)):
        before = reader.at
        if opening == _ALL:
            yield from reader.space()
            if not (yield from reader.literal(_ONE)):
                reader.at = before
                yield Text(opening)
                continue
        if not (yield from _call(reader)):
            reader.at = before
            yield Text(opening)
            continue
        yield from reader.space()
        yield from reader.literal(_ALL_END)


def _call(reader: Reader) -> Reading[bool]:
    name = yield from reader.run(_NAME)
    if not (yield from reader.literal(_SEPARATOR)):
        return False
    yield from reader.space()
    if (yield from reader.peek()) != "{":  # what came was the kind of tool
        name = yield from reader.run(_NAME)
        yield from reader.space()
        yield from reader.literal("```json")
        yield from reader.space()
    if not name or (yield from reader.peek()) != "{":
        return False
    yield Call(name)
    if not (yield from reader.value(Arguments)):
        yield from reader.up_to(_ENDS, Arguments)
        return True
    yield from reader.space()
    yield from reader.literal("```")
    yield from reader.space()
    yield from reader.literal(_ONE_END)
    return True


def _write_v3(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return _write(lark, tools, several, f"function{_SEPARATOR}%s\n```json\n", "\n```")


def _write_v31(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return _write(lark, tools, several, f"%s{_SEPARATOR}", "")


def _write(lark: Lark, tools: Sequence[Tool], several: bool, before: str, after: str) -> str:
    def call(tool: Tool) -> str:
        arguments = lark.json(tool.schema, lenient=not tool.is_strict)
        return lark.rule(f"{lark.literal(_ONE + before % tool.name)} {arguments} {lark.literal(after + _ONE_END)}")

    one = lark.one_of([call(tool) for tool in tools])
    more = f' ("\\n"? {one})*' if several else ""
    return lark.rule(f"{one}{more} {lark.literal(_ALL_END)}")


_MARKERS = (_ALL, _ALL_END, _ONE, _ONE_END, _SEPARATOR)
DEEPSEEK_V3 = ToolFormat(
    "deepseek_v3",
    _read,
    _write_v3,
    opening=_ALL,
    separator=None,
    suits=lambda template, tokens: _ALL in template and "```json" in template,
    markers=_MARKERS,
)
DEEPSEEK_V31 = ToolFormat(
    "deepseek_v31",
    _read,
    _write_v31,
    opening=_ALL,
    separator=None,
    suits=lambda template, tokens: _ALL in template,
    markers=_MARKERS,
)
