"""Calls as a list of JSON objects behind a marker, as several families write them."""

from collections.abc import Callable, Sequence

from .format import Tool, Tools
from .hermes import named_json
from .json_calls import json_calls
from .lark import Lark
from .reader import Markers, Reader, Reading, Text


def list_reader(openings: Sequence[str], ends: Sequence[str] = ()) -> Callable[[Reader, Tools], Reading[None]]:
    """Reads a call or a list of calls behind each of the openings; one of the ends may follow."""
    opening_markers, end_markers = Markers(openings), Markers(ends)

    def read(reader: Reader, tools: Tools) -> Reading[None]:
        while opening := (yield from reader.up_to(opening_markers)):
            before = reader.at
            yield from reader.space()
            if not (yield from json_calls(reader, end_markers)):
                reader.at = before
                yield Text(opening)

    return read


def write_list(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    call = lark.one_of([named_json(lark, tool, "", "") for tool in tools])
    return lark.rule(f'"[" {call} (", " {call})* "]"' if several else f'"[" {call} "]"')
