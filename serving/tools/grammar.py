"""What an answer must be, or may be, as a grammar of llguidance's."""

from collections.abc import Mapping, Sequence
from typing import Any

from .dialect import Dialect
from .format import Tool
from .lark import Lark, token_range


def calls_only(dialect: Dialect, tools: Sequence[Tool], several: bool) -> str:
    """One call, or more of them if there may be several. Raises ValueError for a strict tool that cannot be held to."""
    lark = Lark(dialect.tokens)
    return lark.grammar(_calls(lark, dialect, tools, several))


def calls_or_prose(dialect: Dialect, tools: Sequence[Tool], several: bool) -> str:
    """Any text, in which what begins as a call is one.

    Where prose has in it what calls begin with, this is so only at its beginning. Raises as `calls_only`.
    """
    lark = Lark(dialect.tokens)
    form = dialect.format
    if form.is_bare:
        other = lark.rule(rf"/\s*[^\s\{form.opening}](.|\n)*/")
        return lark.grammar(f"{_calls(lark, dialect, tools, several)} | {other}")
    assert form.write is not None
    call = lark.rule(f"{lark.up_to(form.opening)} {form.write(lark, tools, several)}")
    if dialect.other_ids:
        between = lark.rule(f"TEXT {token_range(dialect.other_ids)}")
        return lark.grammar(f"({call} | {between})* TEXT" if several else f"{between}* ({call} {between}*)? TEXT")
    return lark.grammar(f"{call}* TEXT" if several else f"{call}? TEXT")


def calls_or_json(dialect: Dialect, tools: Sequence[Tool], several: bool, schema: Mapping[str, Any]) -> str:
    """Calls, or JSON that fulfils the schema. Raises as `calls_only`."""
    lark = Lark(dialect.tokens)
    return lark.grammar(f"{_calls(lark, dialect, tools, several)} | {lark.json(schema)}")


def _calls(lark: Lark, dialect: Dialect, tools: Sequence[Tool], several: bool) -> str:
    form = dialect.format
    assert form.write is not None
    call = lark.rule(f"{lark.literal(form.opening)} {form.write(lark, tools, several)}")
    if several and form.separator is not None:
        return lark.rule(f"{call} ({lark.literal(form.separator)} {call})*")
    return call
