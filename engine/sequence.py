"""A request's tokens and where they are on their way: plain Python, no torch."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

from .logits_spec import LogitsSpec
from .step import SampleSettings, TokenLogprobs


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


class Constrains(Protocol):
    """What a grammar allows next; see `constraint.py`."""

    error: str | None

    def accept(self, token_id: int) -> str | None: ...

    def masks(self, drafts: Seq[int]) -> tuple[Any, int]: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids (prompt, then output) and how many of them have their keys and values in the cache.

    ``num_computed_tokens`` catches up with ``len(token_ids)``: after a new prompt, a prefix hit, a preemption alike.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int  # output tokens at most
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # any of these ends the sequence, once min_tokens are out
    eos_token_ids: frozenset[int] = frozenset()  # those of them that are the model's own end tokens
    sample: SampleSpec = field(default_factory=SampleSpec)
    logits: LogitsSpec | None = None  # what becomes of its logits; None: nothing
    logprobs: int | None = None  # how many of the likeliest tokens are told in each place; -1: all
    prompt_logprobs: int | None = None
    forced: tuple[int, ...] = ()  # the first output tokens
    constraint: Constrains | None = None
    priority: int = 0  # lower goes first
    num_candidates: int = 0  # of a beam: continuations that are told, of which its group chooses
    num_beams_to_come: int = 0  # the group's, that begin with its first token
    is_pooled: bool = False  # its prompt's last hidden states are asked for
    num_asked: int = 0  # tokens of its prompt of which nothing is asked, or what is asked of them is in a step
    siblings: list["Sequence"] = field(default_factory=list)  # same prompt, other noise: begun with its first token

    num_prompt_tokens: int = field(init=False)
    status: SequenceStatus = field(init=False, default=SequenceStatus.WAITING)
    num_computed_tokens: int = field(init=False, default=0)
    num_cached_tokens: int | None = field(init=False, default=None)  # found in the prefix cache at first admission
    num_matched_tokens: int = field(init=False, default=0)  # found there when it was queued, while it waits
    num_in_flight: int = field(init=False, default=0)  # tokens in steps that have not come back
    num_draws_in_flight: int = field(init=False, default=0)  # of these steps, those that draw its next token
    last_step: int = field(init=False, default=0)  # the latest that has it
    num_preemptions: int = field(init=False, default=0)
    parent: "Sequence | None" = field(init=False, default=None, repr=False)  # whose sibling it is, until it is begun
    order: int = field(init=False, default=0)  # of arrival
    slot: int | None = field(init=False, default=None)  # on the last stage's ranks, while it runs
    num_told_tokens: int = field(init=False, default=0)  # of its tokens, in that slot
    settings: SampleSettings | None = field(init=False, default=None)  # with which its last token was drawn
    drafts: tuple[int, ...] = field(init=False, default=())  # guessed tokens in the step in flight
    num_drafted: int = field(init=False, default=0)  # guesses so far, and how many were right; forced tokens are none
    num_accepted: int = field(init=False, default=0)
    num_to_draft: int | None = field(init=False, default=None)  # by the draft model, for its next step; None: not known
    drafted: list[int] = field(init=False, default_factory=list)  # of these, the tokens that are there
    num_draft_computed: int = field(init=False, default=0)  # of its tokens, then of `drafted`, in the draft's cache
    num_drafting: int = field(init=False, default=0)  # tokens in a step of the draft model that has not come back
    scores: list[TokenLogprobs] = field(init=False, default_factory=list)  # of its output, if asked for
    prompt_scores: list[TokenLogprobs] = field(init=False, default_factory=list)  # of tokens after those that are asked
    pooled_parts: list[bytes] = field(init=False, default_factory=list)  # float32 [hidden]: sums, of token after token
    candidates: TokenLogprobs | None = field(init=False, default=None)  # of a beam that is held
    is_held: bool = field(init=False, default=False)  # a beam that waits for the others of its group
    block_table: list[int] = field(init=False, default_factory=list)
    block_nodes: list[int] = field(init=False, default_factory=list)  # see BlockManager.commit
    finish_reason: str | None = field(init=False, default=None)  # "stop", "length", "abort" or "error"
    error: str | None = field(init=False, default=None)  # why, if that is "error"

    def __post_init__(self) -> None:
        assert self.prompt_logprobs is None or not self.is_pooled
        self.num_prompt_tokens = len(self.token_ids)
        for sibling in self.siblings:
            sibling.parent = self

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
    def num_reusable_tokens(self) -> int:
        """How many of its tokens it may take from the cache: what is asked of the others must be computed."""
        is_asked = self.prompt_logprobs is not None or self.is_pooled
        return self.num_asked if is_asked and self.num_asked < self.num_prompt_tokens - 1 else self.num_tokens

    @property
    def is_in_flight(self) -> bool:
        """Whether a step has it, so that its blocks are read or written."""
        return self.num_in_flight > 0 or self.num_drafting > 0

    @property
    def needs_host(self) -> bool:
        """Whether its next step takes what the driver makes of the token before."""
        is_forced = self.num_output_tokens < len(self.forced)
        return bool(self.constraint or self.num_candidates or is_forced or self.siblings)

    @property
    def num_expected_tokens(self) -> int:
        """Tokens that it is expected to draw and compute after those pending; the last one drawn is never computed."""
        return max(0, min(self.max_tokens, EXPECTED_TOKENS) - self.num_output_tokens - 1)

    def fork(self) -> "Sequence":
        """Another with the same tokens so far, that holds nothing yet. Of its prompt nothing is asked any more."""
        other = replace(
            self, token_ids=self.token_ids[:], siblings=[], prompt_logprobs=None, is_pooled=False, num_beams_to_come=0
        )
        other.num_prompt_tokens, other.order = self.num_prompt_tokens, self.order
        other.num_cached_tokens = self.num_cached_tokens
        return other

    def forget_drafted(self) -> None:
        """What comes next is drafted anew."""
        self.num_to_draft = None
        self.drafted.clear()

    def end(self, reason: str, error: str | None = None) -> None:
        """Ends it before it is queued."""
        self.move_to(SequenceStatus.FINISHED)
        self.finish_reason, self.error = reason, error

    def move_to(self, status: SequenceStatus) -> None:
        assert status in _LEGAL[self.status], f"{self.request_id}: {self.status} -> {status}"
        self.status = status

    def finish_reason_now(self) -> str | None:
        """Why the sequence ends after the token that was just appended, or None."""
        if self.num_output_tokens >= self.min_tokens and self.token_ids[-1] in self.stop_token_ids:
            return "stop"
        return "length" if self.num_output_tokens >= self.max_tokens else None
