"""Granite 3; the opening depends on the version.

<|tool_call|>[{"name": "weather", "arguments": {"city": "Bern"}}]
<function_call> {"name": "weather", "arguments": {"city": "Bern"}}
"""

from .format import ToolFormat
from .lists import list_reader, write_list

_OPENING = "<|tool_call|>"

GRANITE = ToolFormat(
    "granite",
    list_reader([_OPENING, "<tool_call>", "<function_call>"]),
    write_list,
    opening=_OPENING,
    separator=None,
    suits=lambda template, tokens: _OPENING in template or _OPENING in tokens,
    markers=(_OPENING,),
)
