"""The tokens of sequences whose logits depend on them, on the ranks of the last stage.

    slot 0   | prompt ....... | output .. | drafts |            capacity
    slot 1   | prompt .. | output .................. |

The driver says, slot by slot, how many tokens to keep and which come behind them: one token a step as a rule, that
which a step before has drawn. A row of logits sees the first `length` tokens of its slot, so that rows of one
sequence, after its last token and after each draft, read the same slot.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .logits_spec import LogitsSpec
from .staging import Shapes
from .step import HistoryUpdate
from .step_arrays import known_tokens

_FIRST_CAPACITY = 1024  # tokens


@dataclass(frozen=True)
class HistoryWrites:
    """Tokens that come into slots with a step, as arrays that are still on the host; made by `Histories.plan`."""

    places: "array[int]"  # in all slots, flattened; each once
    token_ids: "array[int]"

    @property
    def shapes(self) -> Shapes:
        count = len(self.places)
        return {"history_places": (torch.int64, (count,)), "history_tokens": (torch.int64, (count,))} if count else {}

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        if self.places:
            host["history_places"][:] = self.places
            host["history_tokens"][:] = self.token_ids


class Histories:
    """`tokens` [num_slots, capacity] int32, and the `LogitsSpec` of each slot's sequence. longest: tokens of one.

    `plan` is called step by step, in the order in which the steps' writes are applied.
    """

    def __init__(self, num_slots: int, longest: int, device: torch.device) -> None:
        self._longest = longest
        self._lengths = [0] * num_slots
        self._specs: list[LogitsSpec | None] = [None] * num_slots
        self.tokens = torch.zeros(num_slots, min(_FIRST_CAPACITY, longest), dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def spec(self, slot: int) -> LogitsSpec:
        """Of the sequence that holds the slot now."""
        spec = self._specs[slot]
        assert spec is not None, f"slot {slot} is not open"
        return spec

    def plan(self, updates: Sequence[HistoryUpdate]) -> HistoryWrites:
        """What the updates write, for the host to send to the device."""
        for update in updates:
            if update.spec is not None:
                self._specs[update.slot], self._lengths[update.slot] = update.spec, 0
            assert update.keep <= self._lengths[update.slot], f"slot {update.slot} has not so many tokens to keep"
            self._lengths[update.slot] = update.keep + len(update.tokens)
        self._grow(max((self._lengths[update.slot] for update in updates), default=0))

        writes = HistoryWrites(array("q"), array("q"))
        for update in updates:
            first = update.slot * self.capacity + update.keep
            writes.places.extend(range(first, first + len(update.tokens)))
            writes.token_ids.extend(update.tokens)
        return writes

    def apply(self, writes: HistoryWrites, arrays: Mapping[str, Tensor], drawn: Tensor) -> None:
        """arrays: those of `writes`, on the device; drawn: int64, by the samples of the step that this is ahead of."""
        if writes.places:
            token_ids = known_tokens(arrays["history_tokens"], drawn)
            self.tokens.view(-1).index_copy_(0, arrays["history_places"], token_ids.int())

    def _grow(self, length: int) -> None:
        assert length <= self._longest, f"{length} tokens are more than the longest sequence's {self._longest}"
        capacity = self.capacity
        while capacity < length:
            capacity = min(2 * capacity, self._longest)
        if capacity > self.capacity:
            grown = self.tokens.new_zeros(len(self.tokens), capacity)
            grown[:, : self.capacity].copy_(self.tokens)
            self.tokens = grown
