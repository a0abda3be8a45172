"""A grammar's hold on one sequence: what may come next, made as soon as it is known what came before."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .structured import Grammar


class Constraint:
    """Follows a sequence's output. end_token_ids: those that end it.

    `masks` says what may come next, of which there is always something while the sequence goes on.
    """

    def __init__(self, grammar: Grammar, end_token_ids: frozenset[int]) -> None:
        self._matcher = grammar.matcher(end_token_ids)
        self._num_words = -(-grammar.vocabulary.size // 32)
        self._masks = np.zeros((1, self._num_words), np.int32)
        self.error: str | None = None
        self._look()

    def accept(self, token_id: int) -> str | None:
        """Takes the next token; "stop" or "error" if the output ends with it."""
        if not self._matcher.accept(token_id):
            self.error = self._matcher.error or f"the grammar does not allow token {token_id}"
            return "error"
        return "stop" if self._matcher.is_finished else self._look()

    def _look(self) -> str | None:
        """Makes the next mask."""
        if self._matcher.fill(self._masks[0]):
            return None
        self.error = self._matcher.error
        return "error" if self.error is not None else "stop"

    def masks(self, drafts: Sequence[int]) -> tuple[Any, int]:
        """int32 [n + 1, ceil(vocab / 32)]: for the next token, and after each of the first n drafts, of which it allows
        no more; and n."""
        if not drafts:
            return self._masks, 0
        masks = np.zeros((len(drafts) + 1, self._num_words), np.int32)
        num_valid = self._matcher.fill_for_drafts(drafts, masks)
        return masks[: num_valid + 1], num_valid
