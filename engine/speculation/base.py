"""What drafts tokens on the driver: plain Python, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from collections.abc import Sequence as Seq


class Drafter(ABC):
    """Guesses how sequences go on, from the tokens that are known.

    A guess changes the number of steps, never a token. Each call costs time in proportion to the tokens it is given
    or asked for, however long the sequence is, and what is proposed depends on the tokens alone, not on the calls that
    brought them.
    """

    @abstractmethod
    def begin(self, sequence_key: Hashable, token_ids: Seq[int], num_prompt_tokens: int | None = None) -> None:
        """A new sequence, with all its tokens so far; the first `num_prompt_tokens` (None: all) are its prompt."""

    @abstractmethod
    def extend(self, sequence_key: Hashable, token_ids: Seq[int]) -> None:
        """Tokens that the sequence has now, after those known before: drawn ones, never drafts."""

    @abstractmethod
    def propose(self, sequence_key: Hashable, max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens that may come next; none where there is no good guess."""

    @abstractmethod
    def end(self, sequence_key: Hashable, finished: bool) -> None:
        """Forgets the sequence; nothing if it never began. `finished`: by itself, its output may be learned from."""
