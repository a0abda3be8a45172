"""Drafts from what most often followed the longest known context, in the request and in outputs that are finished.

As SuffixDecoding (Oliaro et al. 2024): the longest suffix of a sequence that occurred before, in its own tokens or in
other outputs, and from there at each token the most frequent continuation. The probability that a guess is right was
measured on code and prose: where c of n occurrences agree, after m tokens in common,

    p = c / n * s / (s + 3.5)    with support s = m * n**2

and each drafted token makes m one longer. So one occurrence that shares four tokens is followed for two more at the
default threshold, one that shares a long passage for as long as is allowed.

Measured with 32,768 own tokens and 100,000 of other outputs, CPython 3.11, one core of a busy machine:

    begin, a finished output    1.0 us a token
    extend by one token         2.8 us
    propose 5 tokens           12 us, 37 us in a loop, where every place is compared to the end
    memory                    180 bytes a token
"""

from collections import deque
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from .base import Drafter
from .occurrences import FENCE, Occurrences

_LENGTHS = (1, 3, 8)  # of contexts that are looked up; from there they are compared token by token
_MAX_MATCH = 16  # tokens in common beyond which no match counts as longer
_MAX_OCCURRENCES = 16  # the latest ones, in each of the two texts
_HALF_SUPPORT = 3.5  # support at which a unanimous guess is right every second time


@dataclass(frozen=True)
class _Own:
    """A running sequence."""

    text: Occurrences
    num_prompt_tokens: int


class SuffixDrafter(Drafter):
    """Proposes while a draft's estimated probability, of all its tokens together, is `min_probability` or more.

    Outputs of finished sequences are kept up to `max_cached_tokens` in all, the oldest are dropped.
    """

    def __init__(self, min_probability: float, max_cached_tokens: int) -> None:
        self._min_probability = min_probability
        self._running: dict[Hashable, _Own] = {}
        self._finished = FinishedOutputs(max_cached_tokens)

    def begin(self, sequence_key: Hashable, token_ids: Seq[int], num_prompt_tokens: int | None = None) -> None:
        assert sequence_key not in self._running
        own = _Own(Occurrences(_LENGTHS), len(token_ids) if num_prompt_tokens is None else num_prompt_tokens)
        own.text.extend(token_ids)
        self._running[sequence_key] = own

    def extend(self, sequence_key: Hashable, token_ids: Seq[int]) -> None:
        self._running[sequence_key].text.extend(token_ids)

    def propose(self, sequence_key: Hashable, max_tokens: int) -> list[int]:
        own = self._running[sequence_key].text
        num_common, places = _longest_matches(own.token_ids, (own, self._finished.text))
        followers = [known[index : index + max_tokens] for known, index in places]
        return _most_frequent(followers, num_common, max_tokens, self._min_probability)

    def end(self, sequence_key: Hashable, finished: bool) -> None:
        own = self._running.pop(sequence_key, None)
        if own is not None and finished:
            self._finished.add(own.text.token_ids[1 + own.num_prompt_tokens :])


class FinishedOutputs:
    """Outputs one after another in `text`, the oldest first; `max_tokens` in all, or none at all."""

    def __init__(self, max_tokens: int) -> None:
        self.text = Occurrences(_LENGTHS)
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._sizes: deque[int] = deque()

    def add(self, token_ids: Seq[int]) -> None:
        """Of an output that is too long, its end is kept."""
        token_ids = token_ids[max(0, len(token_ids) - self._max_tokens) :]
        if not token_ids:
            return
        while self.num_tokens + len(token_ids) > self._max_tokens:
            size = self._sizes.popleft()
            self.text.drop_text(size)
            self.num_tokens -= size
        self.text.extend(token_ids)
        self.text.end_text()
        self._sizes.append(len(token_ids))
        self.num_tokens += len(token_ids)


def _longest_matches(own: list[int], texts: Seq[Occurrences]) -> tuple[int, list[tuple[list[int], int]]]:
    """How many of the last tokens of `own` stood before, and where: (token ids, index of the token after them)."""
    longest, places = 0, list[tuple[list[int], int]]()
    most = min(_MAX_MATCH, len(own) - 1)  # the fence
    for n in reversed(_LENGTHS):
        if n > most:
            continue
        context = own[-n:]
        for text in texts:
            known = text.token_ids
            for index in text.find(context, _MAX_OCCURRENCES):
                if known[index - n : index] != context:
                    continue
                num_common = n
                while num_common < most and known[index - num_common - 1] == own[-num_common - 1]:
                    num_common += 1
                if num_common > longest:
                    longest, places = num_common, []
                if num_common == longest:
                    places.append((known, index))
        if places:
            break
    return longest, places


def _most_frequent(followers: list[list[int]], num_common: int, max_tokens: int, min_probability: float) -> list[int]:
    """The path that most of `followers` take at each token, among those that took it so far.

    One that ends with the text is read on in the draft, which repeats it: a loop goes on.
    """
    draft: list[int] = []
    probability = 1.0
    while followers and len(draft) < max_tokens:
        at = len(draft)
        tokens = [follower[at] if at < len(follower) else draft[at - len(follower)] for follower in followers]
        counts: dict[int, int] = {}
        for token in tokens:
            counts[token] = counts.get(token, 0) + 1
        best = max(counts, key=counts.__getitem__)  # of equals, the one at the latest place
        support = (num_common + at) * len(tokens) ** 2
        probability *= counts[best] / len(tokens) * support / (support + _HALF_SUPPORT)
        if best == FENCE or probability < min_probability:
            break
        draft.append(best)
        followers = [follower for follower, token in zip(followers, tokens, strict=True) if token == best]
    return draft
