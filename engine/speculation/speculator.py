"""What a replica guesses, and how much of it is checked: plain Python, no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from ..sequence import Sequence
from . import Acceptance, DraftLength, FixedDraftLength, StepCost, create_draft_length, create_drafter

if TYPE_CHECKING:
    from ...config import SpeculativeConfig

_MEMORY = 0.995  # what a checked draft counts for, after each further one: about the last 200 are heard
_PRIOR_DRAFT_COST = 0.25  # of a step of the draft model, in times of one of the target, before any was timed


class Speculator(ABC):
    """Guesses how the sequences of a replica go on, as far as it pays.

    It gets to know a sequence when it is first asked about it, in the middle of its output perhaps.
    """

    def __init__(self, config: "SpeculativeConfig") -> None:
        self.config, self.max_tokens = config, config.num_speculative_tokens
        self.cost = StepCost()  # of the target's steps
        self._acceptance = Acceptance(memory=_MEMORY)  # of all sequences' drafts: what a new one begins with
        self._lengths: dict[Sequence, DraftLength | FixedDraftLength] = {}
        self._num_proposed: dict[Sequence, int] = {}  # of those whose step is not back

    @abstractmethod
    def propose(self, sequence: Sequence, most: int, batch_size: int) -> Seq[int]:
        """Up to `most` tokens that may come next, to be checked in a step of so many sequences."""

    def observe_step(self, model: int, num_rows: int, seconds: float) -> None:
        """A step has come back that computed a token for each of its rows, and none without one."""
        if model == 0:
            self.cost.observe(num_rows, seconds)

    def observe(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """What became of the guesses in the step that is back, if the sequence was asked about for it."""
        num_proposed = self._num_proposed.pop(sequence, None)
        if num_proposed is not None:
            self._lengths[sequence].observe(num_proposed, num_drafted, num_accepted)
            self._acceptance.add(num_drafted, num_accepted)

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self._lengths.pop(sequence, None)
        self._num_proposed.pop(sequence, None)

    def _choose(self, sequence: Sequence, num_proposed: int, batch_size: int, draft_cost: float = 0.0) -> int:
        """How many of so many proposed tokens are checked."""
        if sequence not in self._lengths:
            self._lengths[sequence] = create_draft_length(self.config, self._acceptance.rate())
        self._num_proposed[sequence] = num_proposed
        marginal = self.cost.marginal(batch_size)
        return self._lengths[sequence].choose(num_proposed, marginal, batch_size, draft_cost)


class DrafterSpeculator(Speculator):
    """Guesses on the driver, from the tokens that are known."""

    def __init__(self, config: "SpeculativeConfig") -> None:
        super().__init__(config)
        self._drafter = create_drafter(config)
        self._num_known: dict[Sequence, int] = {}  # to the drafter

    def propose(self, sequence: Sequence, most: int, batch_size: int) -> Seq[int]:
        self._tell(sequence)
        proposal = self._drafter.propose(sequence, min(most, self.max_tokens))
        return proposal[: self._choose(sequence, len(proposal), batch_size)]

    def _tell(self, sequence: Sequence) -> None:
        num_known = self._num_known.get(sequence)
        if num_known is None:
            self._drafter.begin(sequence, sequence.token_ids, sequence.num_prompt_tokens)
        else:
            self._drafter.extend(sequence, sequence.token_ids[num_known:])
        self._num_known[sequence] = sequence.num_tokens

    def end(self, sequence: Sequence) -> None:
        super().end(sequence)
        if sequence in self._num_known:
            self._tell(sequence)
            del self._num_known[sequence]
            self._drafter.end(sequence, finished=sequence.finish_reason in ("stop", "length"))


class DraftModelSpeculator(Speculator):
    """Guesses with a smaller model, in steps of its own (`DraftSteps`). longest: tokens that it can follow."""

    def __init__(self, config: "SpeculativeConfig", longest: int) -> None:
        super().__init__(config)
        self.longest = longest
        self.draft_cost = StepCost()

    def num_wanted(self, sequence: Sequence, most: int, batch_size: int) -> int:
        """How many tokens the draft model is to draw for a sequence, at most `most`."""
        most = min(most, self.longest - sequence.num_tokens)
        if most <= 0:
            return 0
        draft, target = self.draft_cost.seconds(batch_size), self.cost.seconds(batch_size)
        cost = draft / target if draft and target else _PRIOR_DRAFT_COST
        return min(most, self._choose(sequence, self.max_tokens, batch_size, cost))

    def propose(self, sequence: Sequence, most: int, batch_size: int) -> Seq[int]:
        return sequence.drafted[:most]

    def observe_step(self, model: int, num_rows: int, seconds: float) -> None:
        super().observe_step(model, num_rows, seconds)
        if model == 1:
            self.draft_cost.observe(num_rows, seconds)


def create_speculator(config: "SpeculativeConfig", longest: int) -> Speculator:
    """For one replica. longest: tokens of a sequence that a draft model can follow."""
    if config.method == "draft_model":
        return DraftModelSpeculator(config, longest)
    return DrafterSpeculator(config)
