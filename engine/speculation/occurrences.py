"""Where the last tokens of a text stood before: an index that grows with the text and costs the same at any length.

A suffix tree's node is a context, with all the places where it occurs below it. Here are the places alone, for
contexts of a few lengths, linked from the latest backwards. Who looks for the longest match compares further back
from there.

    token_ids   | fence |  a   b   c   x   a   b   c   y   a   b |       contexts of two tokens, ending before ...
    position        0      1   2   3   4   5   6   7   8   9  10  11
    latest[a b]                                    7                     ... the latest place, whose next token is c
    before[7]                      3                                     ... and the one before it

A context is entered when the token after it is known, so the end of the text never finds itself.

A token costs 0.4 us and 60 bytes for each length (CPython 3.11), at any length of the text. A suffix automaton was
tried: 1.8 us and 430 bytes a token without the frequencies, and nothing can be taken out of it again.
"""

from array import array
from collections.abc import Sequence as Seq

FENCE = -1  # no token's id: stands before each text


class Occurrences:
    """One text, or several one after another, that can be dropped again from the first on.

    `token_ids` holds a fence before each text. Indices into it are `position - num_dropped`.
    """

    def __init__(self, lengths: Seq[int]) -> None:
        self.token_ids: list[int] = [FENCE]
        self.num_dropped = 0
        self._text_start = 1  # position: no context reaches across a fence
        # length -> (hash of a context -> latest position after it, position -> the one before it with the same hash)
        self._by_length: dict[int, tuple[dict[int, int], array[int]]] = {n: ({}, array("q", [-1])) for n in lengths}

    def extend(self, token_ids: Seq[int]) -> None:
        """More tokens of the last text."""
        known, dropped = self.token_ids, self.num_dropped
        first = len(known)
        known.extend(token_ids)
        levels = [(n, latest, before) for n, (latest, before) in self._by_length.items()]
        for index in range(first, len(known)):
            position = index + dropped
            for n, latest, before in levels:
                if position - n < self._text_start:
                    before.append(-1)
                    continue
                key = hash(tuple(known[index - n : index]))
                before.append(latest.get(key, -1))
                latest[key] = position

    def end_text(self) -> None:
        """What comes next is another text."""
        self.extend([FENCE])
        self._text_start = self.num_dropped + len(self.token_ids)

    def drop_text(self, num_tokens: int) -> None:
        """Forgets the first text, which has so many tokens and has ended; its closing fence opens the next."""
        count = num_tokens + 1  # that fence takes the place of the one before the text
        assert self.token_ids[count] == FENCE
        for n, (latest, before) in self._by_length.items():
            for index in range(1 + n, count + 1):
                key = hash(tuple(self.token_ids[index - n : index]))
                if latest.get(key) == index + self.num_dropped:
                    del latest[key]
            del before[:count]
        del self.token_ids[:count]
        self.num_dropped += count

    def find(self, context: Seq[int], limit: int) -> list[int]:
        """Indices of tokens that followed `context`, whose length is one of `lengths`: the latest `limit`, last first.

        They are looked up by hash: the tokens before an index are still to be compared.
        """
        latest, before = self._by_length[len(context)]
        found: list[int] = []
        index = latest.get(hash(tuple(context)), -1) - self.num_dropped
        while index > 0 and len(found) < limit:
            found.append(index)
            index = before[index] - self.num_dropped
        return found
