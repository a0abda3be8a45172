"""Calls that are written as JSON objects: {"name": …, "arguments": {…}}, one or a list of them."""

import re
from collections.abc import Callable

from .reader import Arguments, Call, Markers, Reader, Reading

_ARGUMENTS = ("arguments", "parameters")
_OTHERS = ("id", "type")
_NOTHING = Markers(())
_TOO_MANY = re.compile(r"[\s\]}]*")


def any_name(name: str) -> bool:
    return True


def json_call(reader: Reader, is_tool: Callable[[str], bool] = any_name, end: Markers = _NOTHING) -> Reading[bool]:
    """Reads one call. False, and nothing is taken, where there is none; with its arguments it has begun for good.

    end: what the call is followed by; it is taken too. Arguments that are no JSON go on up to there.
    """
    start, name, held = reader.at, None, None
    has_begun = False
    if not (yield from reader.literal("{")):
        return False
    while True:
        yield from reader.space()
        key = yield from reader.string()
        yield from reader.space()
        if key not in ("name", *_ARGUMENTS, *_OTHERS) or not (yield from reader.literal(":")):
            break
        yield from reader.space()
        if key == "name" and name is None:
            name = yield from reader.string()
            if name is None or not is_tool(name):
                break
        elif key in _ARGUMENTS and name is not None and not has_begun:
            has_begun = True
            yield Call(name)
            if not (yield from _arguments(reader)):
                yield from reader.up_to(end, Arguments)
                return True
        else:
            before = reader.at
            if not (yield from reader.value()):
                break
            if key in _ARGUMENTS:
                held = reader.text[before : reader.at]
        yield from reader.space()
        if not (yield from reader.literal(",")):
            break
    closed = yield from reader.literal("}")
    if not has_begun:
        if name is None or not closed:
            reader.at = start
            return False
        yield Call(name)
        yield Arguments(held or "{}")
    if end.texts:
        yield from _close(reader, end)
    return True


def _arguments(reader: Reader) -> Reading[bool]:
    """False where they break off."""
    first = yield from reader.peek()
    if first == '"':  # JSON in a string of JSON
        text = yield from reader.string()
        if text is not None:
            yield Arguments(text)
        return text is not None
    if first == "n" and (yield from reader.literal("null")):
        yield Arguments("{}")
        return True
    return (yield from reader.value(Arguments))


def _close(reader: Reader, end: Markers) -> Reading[None]:
    """Takes the end of a call, where it comes: after a bracket too many perhaps."""
    before = reader.at
    yield from reader.run(_TOO_MANY)
    for text in end.texts:
        if (yield from reader.literal(text)):
            return
    if not (yield from reader.breaks_off_in(*end.texts)):
        reader.at = before


def json_calls(reader: Reader, end: Markers = _NOTHING) -> Reading[bool]:
    """Reads one call or a list of them. False, and nothing is taken, where there is none."""
    start, found = reader.at, False
    if not (yield from reader.literal("[")):
        return (yield from json_call(reader, end=end))
    while True:
        yield from reader.space()
        if not (yield from json_call(reader)):
            break
        found = True
        yield from reader.space()
        if not (yield from reader.literal(",")):
            break
    if not found:
        reader.at = start
    elif (yield from reader.literal("]")):
        yield from _close(reader, end)
    return found
