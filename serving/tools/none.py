"""No format: what a model writes is text."""

from .format import ToolFormat, Tools
from .reader import Markers, Reader, Reading


def _read(reader: Reader, tools: Tools) -> Reading[None]:
    yield from reader.up_to(Markers(()))


NONE = ToolFormat("none", _read, None, "", None, suits=lambda template, tokens: False)
