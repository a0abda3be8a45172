"""What one model's tokenizer and chat template can do about tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ...config.errors import ConfigError
from .format import ToolFormat
from .hermes import HERMES
from .reader import Markers
from .registry import format_named, format_of

_PROBE = "probe_of_tools"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class Dialect:
    """Made once for a model.

    added: all tokens beside the tokenizer's own vocabulary; special: those that are left out of text.
    """

    format: ToolFormat
    tools_in: Literal["template", "system", "text"]  # its variable, a field of the system message, or neither
    takes_system: bool  # the chat template has a place for a system message
    added: Mapping[str, int]
    special: frozenset[str]

    @classmethod
    def of(cls, tokenizer: Any, name: str = "auto") -> "Dialect":
        """name: of a format, or "auto" for the model's own. Raises ConfigError, one line."""
        added, special = {}, set()
        for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
            added[token.content] = token_id
            if token.special:
                special.add(token.content)
        tools_in = _place_of_tools(tokenizer)
        takes_system = _PROBE in _rendered(tokenizer, [_message("system", _PROBE), _message("user")])
        if name == "auto":
            found = HERMES if tools_in == "text" else format_of(_template(tokenizer), added)
        else:
            found = format_named(name)
        if tools_in == "text" and found.name not in ("hermes", "none"):
            raise ConfigError(
                f"tool parser: {name!r} does not go with a chat template that shows the model no tools, which are then "
                "described to it in Hermes' format; give 'hermes' or 'none', or a chat template that shows them"
            )
        return cls(found, tools_in, takes_system, added, frozenset(special))

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The format's markers that are tokens."""
        return {text: self.added[text] for text in self.format.markers if text in self.added}

    @cached_property
    def needs_special_tokens(self) -> bool:
        """Whether text without special tokens does not show calls."""
        return not self.special.isdisjoint(self.format.markers)

    @property
    def has_short_ids(self) -> bool:
        """Whether the chat template refuses ids of calls that are not 9 letters and digits."""
        return self.format.name.startswith("mistral")

    @cached_property
    def unwanted(self) -> Markers:
        """What must then be left out of the text."""
        return Markers(self.special.difference(self.format.markers))

    @cached_property
    def other_ids(self) -> list[int]:
        """Tokens that prose may have in it: <think>, say."""
        known = self.special.union(self.format.markers)
        return sorted(token_id for text, token_id in self.added.items() if text not in known)


def _place_of_tools(tokenizer: Any) -> Literal["template", "system", "text"]:
    if _PROBE in _rendered(tokenizer, [_message("user")], tools=[_PROBE_TOOL]):
        return "template"
    system = {**_message("system"), "tools": _PROBE}
    return "system" if _PROBE in _rendered(tokenizer, [system, _message("user")]) else "text"


def _message(role: str, content: str = "") -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Empty where the template refuses."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))
    except Exception:  # a template can fail in any way
        return ""


def _template(tokenizer: Any) -> str:
    return str(tokenizer.get_chat_template(tools=[_PROBE_TOOL]))
