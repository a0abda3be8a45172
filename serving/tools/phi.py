"""Phi 4 mini, with its tokens or, as its model card has it, without.

<|tool_call|>[{"name": "weather", "arguments": {"city": "Bern"}}]<|/tool_call|>
functools[{"name": "weather", "arguments": {"city": "Bern"}}]
"""

from collections.abc import Sequence

from .format import Tool, ToolFormat
from .lark import Lark
from .lists import list_reader, write_list

_OPENING, _END = "<|tool_call|>", "<|/tool_call|>"


def _write(lark: Lark, tools: Sequence[Tool], several: bool) -> str:
    return f"{write_list(lark, tools, several)} {lark.literal(_END)}"


PHI4_MINI = ToolFormat(
    "phi4_mini",
    list_reader([_OPENING, "functools"], [_END]),
    _write,
    opening=_OPENING,
    closing=_END,
    separator=None,
    suits=lambda template, tokens: _END in template or _END in tokens,
    markers=(_OPENING, _END),
)
