"""How many of the tokens proposed for a sequence are checked: as many as pay for their rows."""

from dataclasses import dataclass

_PRIOR = 0.6  # acceptance that is assumed where nothing is known
_MEMORY = 0.95  # what a checked draft counts for, after each further one: about the last 20 are heard
_PRIOR_WEIGHT = 2.0  # drafts that an acceptance assumed beforehand counts for
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 128  # proposals in a row of which none is checked, before one is tried
_AT_ONCE = 1 << 30  # left out so often that it is time for a try
_TRIED_SHARE = 0.01  # of the time, at most, that goes into such tries


class DraftLength:
    """Follows one sequence: `choose` once for each proposal, `observe` when the step with its drafts is back.

    Let a be the probability that a draft is accepted if those before it were. Then k drafts bring a + a**2 + ... + a**k
    tokens beside the one that any step brings. Each adds a row to the step, which every sequence of the batch waits
    for: if all do likewise, tokens over time are as

        (1 + a + ... + a**k) / (1 + k * (batch_size * marginal_cost + draft_cost))

    and the k with the greatest is taken. A drafter that ends its proposals where it gets unsure says by their length
    what they are worth, so a is measured for each length apart, and begins as that of all lengths together.

    Where k is 0, one token is tried now and then, less often the dearer that is and the longer it fails; a try that is
    accepted is followed by another at once, until drafts pay again or one is refused.
    """

    def __init__(self, max_tokens: int, prior: float = _PRIOR) -> None:
        self._prior = prior  # acceptance that is assumed at the start
        self._all = Acceptance()
        self._by_length = [_Length() for _ in range(max_tokens + 1)]

    def acceptance(self, num_proposed: int) -> float:
        """Estimate of a for proposals of this length."""
        return self._by_length[num_proposed].rate(self._all.rate(self._prior))

    def choose(self, num_proposed: int, marginal_cost: float, batch_size: int, draft_cost: float = 0.0) -> int:
        """How many of the `num_proposed` tokens the next step checks.

        marginal_cost: time of one more row, in times of a step of the batch without drafts. batch_size: sequences in
        it. draft_cost: time in which one more token is drafted for the whole batch, in the same unit.
        """
        cost = batch_size * marginal_cost + draft_cost
        best = best_length(self.acceptance(num_proposed), cost, num_proposed)
        if best or not num_proposed:
            return best
        measured = self._by_length[num_proposed]
        measured.num_left_out += 1
        # A try is one row for this sequence, but a draft for it alone takes as long as for all.
        cost_of_try = marginal_cost + draft_cost
        return int(measured.num_left_out >= max(measured.pause, batch_size * cost_of_try / _TRIED_SHARE))

    def observe(self, num_proposed: int, num_drafted: int, num_accepted: int) -> None:
        """What became of a proposal of which so many tokens were in a step; of none, nothing is learned."""
        assert 0 <= num_accepted <= num_drafted <= num_proposed
        if num_drafted:
            self._all.add(num_drafted, num_accepted)
            self._by_length[num_proposed].observe(num_drafted, num_accepted)


class FixedDraftLength:
    """All that is proposed, whatever becomes of it."""

    def choose(self, num_proposed: int, marginal_cost: float, batch_size: int, draft_cost: float = 0.0) -> int:
        return num_proposed

    def observe(self, num_proposed: int, num_drafted: int, num_accepted: int) -> None:
        pass


@dataclass
class Acceptance:
    """Drafts that were checked, the latest counting most."""

    memory: float = _MEMORY
    accepted: float = 0.0
    checked: float = 0.0

    def rate(self, prior: float = _PRIOR) -> float:
        return (self.accepted + _PRIOR_WEIGHT * prior) / (self.checked + _PRIOR_WEIGHT)

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Drafts after the first that was refused say nothing."""
        for i in range(min(num_accepted + 1, num_drafted)):
            self.accepted = self.accepted * self.memory + (i < num_accepted)
            self.checked = self.checked * self.memory + 1


@dataclass
class _Length(Acceptance):
    """The same of proposals of one length, and how many of these were not checked."""

    num_left_out: int = 0  # since the last that was tried
    pause: int = _FIRST_PAUSE

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        self.add(num_drafted, num_accepted)
        if num_accepted:
            self.num_left_out, self.pause = _AT_ONCE, _FIRST_PAUSE  # if the next is left out too, it is tried
        elif self.num_left_out:
            self.num_left_out, self.pause = 0, min(2 * self.pause, _LONGEST_PAUSE)


def best_length(acceptance: float, cost: float, max_tokens: int) -> int:
    """The k in 0..max_tokens with the greatest (1 + a + ... + a**k) / (1 + k * cost).

    One more token raises the quotient while what it brings over what it costs, a**k / cost, is above the quotient. That
    falls with k, and the first that is not above is followed by none that is.
    """
    length, gain, tokens, time = 0, acceptance, 1.0, 1.0
    while length < max_tokens and gain * time > cost * tokens:
        length, tokens, time, gain = length + 1, tokens + gain, time + cost, gain * acceptance
    return length
