"""What steps drew, on the ranks where later steps need it before the driver knows.

A step that is ahead of another (`StepInput.ahead_of`) takes the tokens which that one draws: on the first stage as its
own tokens, on the last for its histories. In a pipeline the last stage sends them to the first, step by step, and who
needs none of them leaves them on their way until there are more than can be in flight.
"""

from collections import deque

import torch
from torch import Tensor

from ..mesh.collectives import Communicator, Pending
from .step import StepInput


class DrawnTokens:
    """int64 [num_samples] of each of the last steps. pp: the pipeline whose last stage tells the first; None: no stage
    tells another."""

    def __init__(self, pp: Communicator | None, depth: int, device: torch.device) -> None:
        self._pp, self._depth, self._device = pp, depth, device  # depth: steps that can be in flight
        self._known: dict[int, Tensor] = {}  # by step id, the oldest first
        self._coming: deque[tuple[int, int]] = deque()  # steps and their samples
        self._leaving: deque[Pending] = deque()
        self._none = torch.zeros(1, dtype=torch.int64, device=device)

    def of(self, step: StepInput) -> Tensor:
        """Those of the step that `step` is ahead of, once they are there; if it is ahead of none, any."""
        if not step.ahead_of:
            return self._none
        while step.ahead_of not in self._known and self._pp is not None:
            self._receive(self._pp)
        return self._known[step.ahead_of]

    def expect(self, step: StepInput) -> None:
        """On the first stage, with each step in turn: its draws will come."""
        if self._pp is None or not step.samples:
            return
        self._coming.append((step.step_id, len(step.samples)))
        while len(self._coming) > self._depth:
            self._receive(self._pp)

    def _receive(self, pp: Communicator) -> None:
        step_id, num_samples = self._coming.popleft()
        tokens = torch.empty(num_samples, dtype=torch.int64, device=self._device)
        self.keep(step_id, pp.irecv(tokens, pp.size - 1).wait())

    def keep(self, step_id: int, tokens: Tensor) -> None:
        """What a step drew; again, if it was not final."""
        self._known[step_id] = tokens
        while len(self._known) > self._depth:
            del self._known[next(iter(self._known))]

    def tell(self, step_id: int) -> None:
        """On the last stage, once what a step drew is final."""
        if self._pp is None:
            return
        self._leaving.append(self._pp.isend(self._known[step_id], 0))
        while len(self._leaving) > self._depth + 1:  # which the first stage has begun to receive long ago
            self._leaving.popleft().wait()
