"""Llama 4, Llama 3.2 and others: a list of calls as in Python. It is parsed, and never evaluated.

[weather(city='Bern', days=3), time()]
"""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from .format import Tool, ToolFormat, Tools
from .lark import Lark
from .reader import Arguments, Call, Markers, Reader, Reading, Text

_OPENINGS = Markers(["["])
_NAME = re.compile(r"[\w.-]*")
_IN_STRING = {quote: re.compile(rf"[{quote}\\]") for quote in "'\""}
_OUTSIDE = re.compile(r"""['"(){}\[\]]""")
_CLOSES = {")": "(", "}": "{", "]": "["}
_JSON_NAMES = {"true": True, "false": False, "null": None}


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    """A bracket begins calls if the name of a tool and a parenthesis follow: all others are text."""
    while opening := (yield from reader.up_to(_OPENINGS)):
        before, has_called = reader.at, False
        while True:
            yield from reader.space()
            name = yield from reader.run(_NAME)
            if name not in tools or (yield from reader.peek()) != "(":
                break
            start = reader.at
            if not (yield from _in_brackets(reader)):
                break
            arguments = _as_json(reader.text[start : reader.at], tools[name])
            if arguments is None:
                break
            has_called = True
            yield Call(name)
            yield Arguments(arguments)
            before = reader.at
            yield from reader.space()
            if not (yield from reader.literal(",")):
                break
        reader.at = before
        if not has_called:
            yield Text(opening)
            continue
        yield from reader.space()
        if not (yield from reader.literal("]")):
            reader.at = before


def _in_brackets(reader: Reader) -> Reading[bool]:
    """Takes from a bracket to the one that closes it. False where none does."""
    quote, brackets = "", list[str]()
    while True:
        found = (_IN_STRING[quote] if quote else _OUTSIDE).search(reader.text, reader.at)
        if found is None or (found[0] == "\\" and found.end() == len(reader.text)):
            reader.at = found.start() if found else len(reader.text)
            if not (yield from reader.more()):
                return False
            continue
        reader.at, char = found.end(), found[0]
        if char == "\\":
            reader.at += 1
        elif char in "'\"":
            quote = "" if quote else char
        elif char in "([{":
            brackets.append(char)
        elif brackets.pop() != _CLOSES[char]:
            return False
        elif not brackets:
            return True


def _as_json(arguments: str, tool: Tool) -> str | None:
    """Arguments in their parentheses as a JSON object; None for what are no literals."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        values = dict(zip(tool.properties, map(_value, call.args), strict=False))
        if len(values) < len(call.args):
            return None
        values |= {keyword.arg or "": _value(keyword.value) for keyword in call.keywords}
        return None if "" in values else json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    """Raises ValueError for what is no literal, TypeError for one that has no form in JSON."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):  # bool is an int
            return value
        case ast.Name(id=name) if name in _JSON_NAMES:
            return _JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_value(part) for part in parts]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
    raise ValueError


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    if not isinstance(key, str):
        raise ValueError
    return key


def _write(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    call = lark.one_of([_written(lark, tool) for tool in tools])
    return lark.rule(f'{call} (", " {call})* "]"' if several else f'{call} "]"')


def _written(lark: Lark, tool: Tool) -> str:
    """A call; its arguments come in the schema's order."""
    if not tool.is_plain:
        raise tool.refuse("a schema that is more than properties", PYTHONIC.name)
    parts = []
    for name, (schema, required) in tool.properties.items():
        if name.isidentifier():
            parts.append((f"{lark.literal(name + '=')} {_literal(lark, schema, tool.is_strict)}", required))
        elif required:
            raise tool.refuse(f"the parameter '{name}', which is no name in Python,", PYTHONIC.name)
    first = rest = ""  # what may come before, and after, one that is there; begun from the last
    for expression, required in reversed(parts):
        here = lark.rule(f"{expression} {rest}")
        if required:
            first, rest = here, lark.rule(f'", " {here}')
        else:
            first = lark.rule(f"{here} | {first}" if first else f"({here})?")
            rest = lark.rule(f'(", " {expression})? {rest}')
    return lark.rule(" ".join(filter(None, [lark.literal(f"{tool.name}("), first, '")"'])))


def _literal(lark: Lark, schema: dict[str, Any], is_strict: bool) -> str:
    """A value: as in JSON, whose names for constants are read too; but for those as Python has them."""
    match schema.get("type"):
        case "boolean" if "enum" not in schema and "const" not in schema:
            return '("True" | "False")'
        case "null":
            return '"None"'
    return lark.json(schema, lenient=not is_strict)


PYTHONIC = ToolFormat(
    "pythonic",
    _read,
    _write,
    opening="[",
    separator=None,
    suits=lambda template, tokens: "[func_name" in template or "[func1(" in template,
    is_bare=True,
)
