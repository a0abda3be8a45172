"""Prompt lookup: what followed the last few tokens where they last stood in the same request."""

from collections.abc import Hashable
from collections.abc import Sequence as Seq

from .base import Drafter
from .occurrences import Occurrences


class NGramDrafter(Drafter):
    """Matches the last `max_ngram` tokens, else fewer, down to `min_ngram`; the latest match wins (Saxena 2023).

    What is copied may run into what was copied before it, so that a loop of any period goes on.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        assert 1 <= min_ngram <= max_ngram
        self._lengths = range(min_ngram, max_ngram + 1)
        self._texts: dict[Hashable, Occurrences] = {}

    def begin(self, sequence_key: Hashable, token_ids: Seq[int], num_prompt_tokens: int | None = None) -> None:
        assert sequence_key not in self._texts
        self._texts[sequence_key] = Occurrences(self._lengths)
        self.extend(sequence_key, token_ids)

    def extend(self, sequence_key: Hashable, token_ids: Seq[int]) -> None:
        self._texts[sequence_key].extend(token_ids)

    def propose(self, sequence_key: Hashable, max_tokens: int) -> list[int]:
        text = self._texts[sequence_key]
        known = text.token_ids
        for n in reversed(self._lengths):
            if n >= len(known):  # of which one is the fence
                continue
            context = known[-n:]
            for index in text.find(context, limit=1):
                if known[index - n : index] == context:
                    copied = known[index : index + max_tokens]
                    return [copied[i % len(copied)] for i in range(max_tokens)]
        return []

    def end(self, sequence_key: Hashable, finished: bool) -> None:
        self._texts.pop(sequence_key, None)
