"""A grammar's hold on one sequence: what may come next, made as soon as it is known what came before."""

from collections.abc import Sequence

import numpy as np

from .structured import Grammar, Mask


class Constraint:
    """Follows a sequence's output. end_token_ids: those that end it.

    While the sequence goes on there is always a token that may come. `error`: why it cannot go on.
    """

    def __init__(self, grammar: Grammar, end_token_ids: frozenset[int]) -> None:
        self._matcher = grammar.matcher(end_token_ids)
        self._masks = np.empty((1, grammar.vocabulary.num_words), np.int32)  # now, and after each of `_drafts`
        self._drafts: tuple[int, ...] = ()
        self.error: str | None = None
        self._look()

    def accept(self, token_id: int) -> str | None:
        """Takes the next token; "stop" or "error" if the output ends with it."""
        if not self._matcher.accept(token_id):
            # Of what a mask bans, only a user's processor can let something through.
            self.error = self._matcher.error or (
                f"structured_outputs: token {token_id} was drawn, which the grammar does not allow here: "
                "logits_processors let it through"
            )
            return "error"
        if self._matcher.is_finished:
            return "stop"
        if self._drafts and token_id == self._drafts[0]:
            self._masks, self._drafts = self._masks[1:], self._drafts[1:]
            return None
        return self._look()

    def _look(self) -> str | None:
        """Makes the next mask."""
        self._masks, self._drafts = self._masks[:1], ()
        if self._matcher.fill(self._masks[0]):
            return None
        self.error = self._matcher.error
        return "error" if self.error is not None else "stop"

    def masks(self, drafts: Sequence[int]) -> tuple[Mask, int]:
        """int32 [n + 1, ceil(vocab / 32)]: for the next token, and after each of the first n drafts; and n, how many of
        them it allows without the output's being whole."""
        drafts = tuple(drafts)
        if drafts != self._drafts[: len(drafts)]:
            self._guess(drafts)
        num_valid = min(len(drafts), len(self._drafts))
        return self._masks[: num_valid + 1], num_valid

    def _guess(self, drafts: tuple[int, ...]) -> None:
        """Makes the masks after drafts; those that went before with the same beginning are known."""
        num_known = len(self._drafts) if drafts[: len(self._drafts)] == self._drafts else 0
        masks = np.empty((len(drafts) + 1, self._masks.shape[1]), np.int32)
        masks[: num_known + 1] = self._masks[: num_known + 1]
        num_valid = self._matcher.fill_after(drafts, masks[1:], num_known)
        self._masks, self._drafts = masks[: num_valid + 1], drafts[:num_valid]
