"""What formats of tool calls are read with: a text that comes in pieces, and generators that wait for more of it.

A format is a generator that reads the text as if it were all there. Where it is not it yields None and is gone on with
when there is more, so what it finds does not depend on how the text was cut. What it finds are events.
"""

import json
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Text:
    """More of what is said beside the calls."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments, JSON, of the call that began last."""

    text: str


Event = Text | Call | Arguments
T = TypeVar("T")
Reading = Generator[Event | None, None, T]

_SPACE = re.compile(r"\s*")
_SCALAR = re.compile(r"[-+.\w]*")
_BETWEEN = re.compile(r"[-+.:,\w\s]*")  # of JSON, what is neither a string nor a bracket
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_CLOSES = {"}": "{", "]": "["}


class Markers:
    """Texts that are looked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = sorted(texts, key=len, reverse=True)  # of several that begin alike the longest is found
        self._any = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._first = re.compile("|".join(re.escape(char) for char in {text[0] for text in self.texts}) or r"(?!)")
        self._longest = len(self.texts[0]) if self.texts else 1

    def find(self, text: str, start: int) -> tuple[int, str] | None:
        found = self._any.search(text, start)
        return (found.start(), found[0]) if found else None

    def find_begun(self, text: str, start: int) -> int:
        """Where an end of the text may become one of these, or a longer one of these; else the text's length."""
        for found in self._first.finditer(text, max(start, len(text) - self._longest + 1)):
            end = text[found.start() :]
            if any(len(marker) > len(end) and marker.startswith(end) for marker in self.texts):
                return found.start()
        return len(text)


class Reader:
    """A text of which the part from `at` on is not read yet. What lies before may be gone after `up_to` and `value`."""

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.ended = False  # no more will come

    def more(self) -> Reading[bool]:
        """Waits for more; False at the end."""
        known = len(self.text)
        while len(self.text) == known and not self.ended:
            yield None
        return len(self.text) > known

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        if self.at == len(self.text):
            yield from self.more()
        return self.text[self.at : self.at + 1]

    def literal(self, text: str) -> Reading[bool]:
        """Takes this text, if it is what comes."""
        while len(self.text) - self.at < len(text):
            if not text.startswith(self.text[self.at :]) or not (yield from self.more()):
                return False
        found = self.text.startswith(text, self.at)
        self.at += len(text) if found else 0
        return found

    def breaks_off_in(self, *texts: str) -> Reading[bool]:
        """Whether all that is left, and no more comes, is the beginning of one of these; it is taken then."""
        while any(text.startswith(self.text[self.at :]) for text in texts):
            if not (yield from self.more()):
                self.at = len(self.text)
                return True
        return False

    def run(self, characters: re.Pattern[str]) -> Reading[str]:
        """Takes all that comes of these characters (a pattern of one class, repeated)."""
        while True:
            found = characters.match(self.text, self.at)
            assert found is not None
            if found.end() < len(self.text) or not (yield from self.more()):
                self.at = found.end()
                return found[0]

    def space(self) -> Reading[None]:
        yield from self.run(_SPACE)

    def up_to(
        self, markers: Markers, give: Callable[[str], Event | None] = Text, keeps_begun: bool = True
    ) -> Reading[str | None]:
        """Gives what comes before the first of the markers, and takes that; None where the text ends without one.

        give: may keep it for itself. keeps_begun: also what a text ends with that may have become a marker.
        """
        while True:
            found = markers.find(self.text, self.at)
            begun = len(self.text) if self.ended and keeps_begun else markers.find_begun(self.text, self.at)
            place = min(begun, found[0]) if found else begun
            if place > self.at:
                event = give(self.text[self.at : place])
                self.at = place
                self._drop()
                if event is not None:
                    yield event
            elif found and found[0] == self.at < begun:
                self.at += len(found[1])
                return found[1]
            elif not (yield from self.more()) and not (keeps_begun and self.at < len(self.text)):
                self.at = len(self.text)
                return None

    def string(self) -> Reading[str | None]:
        """Takes a JSON string; None, and nothing is taken, where there is none that is whole."""
        start = self.at
        if (yield from self.peek()) == '"' and (yield from self.value()):
            try:
                return str(json.loads(self.text[start : self.at], strict=False))
            except ValueError:
                pass
        self.at = start
        return None

    def value(self, give: Callable[[str], Event] | None = None) -> Reading[bool]:
        """Takes a JSON value, and gives it as it comes. False where it breaks off, because the text ends or is no JSON.

        Only strings and brackets are looked at: what else may be wrong with it is left to whoever parses it.
        """
        given, is_string = self.at, False
        brackets: list[str] = []
        whole: bool | None = None
        if (yield from self.peek()) not in ('"', "{", "["):
            whole = bool((yield from self.run(_SCALAR)))
        while whole is None:
            before = self.at
            if is_string:
                found = _QUOTE_OR_ESCAPE.search(self.text, self.at)
                self.at = found.start() if found else len(self.text)
                if found and found[0] == '"':
                    self.at, is_string = found.end(), False
                    whole = None if brackets else True
                elif found and found.end() < len(self.text):
                    self.at = found.end() + 1
            else:
                between = _BETWEEN.match(self.text, self.at)
                assert between is not None
                self.at = between.end()
                char = self.text[self.at : self.at + 1]
                if char == '"':
                    is_string = True
                elif char in ("{", "["):
                    brackets.append(char)
                elif char in _CLOSES and brackets and brackets[-1] == _CLOSES[char]:
                    brackets.pop()
                    whole = None if brackets else True
                elif char:
                    whole = False
                self.at += 0 if whole is False else len(char)
            if whole is None and self.at in (before, len(self.text)):  # all is read, or an escape's end is missing
                if give and self.at > given:
                    event = give(self.text[given : self.at])
                    self._drop()
                    given = 0
                    yield event
                if not (yield from self.more()):
                    self.at, whole = len(self.text), False
        if give and self.at > given:
            event = give(self.text[given : self.at])
            self._drop()
            yield event
        return whole

    def _drop(self) -> None:
        self.text, self.at = self.text[self.at :], 0


class EventParser:
    """Finds events in a text that comes in pieces. read: a format's, or any other generator of them."""

    def __init__(self, read: Callable[[Reader], Reading[None]]) -> None:
        self._reader = Reader()
        self._reading = read(self._reader)

    def feed(self, text: str) -> list[Event]:
        self._reader.text += text
        events = []
        for event in self._reading:  # which goes on with the next call, unless it is through
            if event is None:
                break
            events.append(event)
        return events

    def finish(self) -> list[Event]:
        """What is left, now that no more text comes."""
        self._reader.ended = True
        return self.feed("")
