"""A request's tokens and where they are on their way: plain Python, no torch."""

from dataclasses import dataclass, field
from enum import Enum


class SequenceStatus(Enum):
    WAITING = "waiting"  # holds no blocks; new, or preempted
    RUNNING = "running"  # holds blocks; takes part in steps
    FINISHED = "finished"


_LEGAL = {
    SequenceStatus.WAITING: {SequenceStatus.RUNNING, SequenceStatus.FINISHED},
    SequenceStatus.RUNNING: {SequenceStatus.WAITING, SequenceStatus.FINISHED},
    SequenceStatus.FINISHED: set[SequenceStatus](),
}


EXPECTED_TOKENS = 128  # of an output that may be longer: many end by themselves before


@dataclass(frozen=True)
class SampleSpec:
    """How a sequence's tokens are drawn, and when it ends; numbers only, sent to the ranks."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # of this request: with the position it gives the noise


@dataclass(eq=False)
class Sequence:
    """Token ids (prompt, then output) and how many of them have their keys and values in the cache.

    ``num_computed_tokens`` catches up with ``len(token_ids)``: after a new prompt, a prefix hit, a preemption alike.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int  # output tokens at most
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # any of these ends the sequence, once min_tokens are out
    sample: SampleSpec = field(default_factory=SampleSpec)

    num_prompt_tokens: int = field(init=False)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    num_computed_tokens: int = field(init=False, default=0)
    num_cached_tokens: int | None = field(init=False, default=None)  # found in the prefix cache at first admission
    num_matched_tokens: int = field(init=False, default=0)  # found there when it was queued, while it waits
    num_in_flight: int = field(init=False, default=0)  # tokens in steps that have not come back
    num_draws_in_flight: int = field(init=False, default=0)  # of these steps, those that draw its next token
    num_preemptions: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list)
    block_nodes: list[int] = field(init=False, default_factory=list)  # see BlockManager.commit
    finish_reason: str | None = field(init=False, default=None)  # "stop", "length" or "abort"

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens computed, or in a step: with a draw in flight, up to one more than are known."""
        return self.num_computed_tokens + self.num_in_flight

    @property
    def num_expected_tokens(self) -> int:
        """Tokens that it is expected to draw and compute after those pending; the last one drawn is never computed."""
        return max(0, min(self.max_tokens, EXPECTED_TOKENS) - self.num_output_tokens - 1)

    def move_to(self, status: SequenceStatus) -> None:
        assert status in _LEGAL[self.status], f"{self.request_id}: {self.status} -> {status}"
        self.status = status

    def finish_reason_now(self) -> str | None:
        """Why the sequence ends after the token that was just appended, or None."""
        if self.num_output_tokens >= self.min_tokens and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if self.num_output_tokens >= self.max_tokens else None
