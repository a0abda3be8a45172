"""A step that is under way: what it drew is final when it is told, however often its end was interrupted."""

from array import array
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meshlm.engine.drawing import DrawingPlan, Drawn
from meshlm.engine.histories import HistoryWrites
from meshlm.engine.model_runner import RunningStep
from meshlm.engine.sampler import Draw, Draws, Filtered, Settings
from meshlm.engine.step import SampleRequest, SampleSettings, StepInput

NOT_FINAL, FINAL = 5, 77


def drawn(interrupts: Callable[[], None]) -> Drawn:
    """A token that is to be drawn again, from candidates that did not suffice."""
    sample = SampleRequest(0, 1, SampleSettings(0, 1.0, 0, 0.9, 0.0))
    step = StepInput(1, array("q", [1]), (1,), (0,), (array("i", [0]),), (sample,))
    plan = DrawingPlan(
        step, Draws(Settings((sample.settings,), 100), True), HistoryWrites(array("q"), array("q")), None, (), [], []
    )
    noise, filters = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(3, 1)
    filtered = Filtered(torch.tensor([0]), torch.zeros(1, 100), torch.ones(1), noise, filters, 8, True)

    class Interrupted(Drawn):
        @property
        def numbers(self) -> list[Tensor]:
            interrupts()
            return super().numbers

    return Interrupted(Draw(torch.tensor([NOT_FINAL, 0]), filtered), plan)


@pytest.mark.parametrize("moment", ["redraw", "numbers"])
def test_an_interrupted_end_is_made_good(moment: str) -> None:
    left = {moment: 1}

    def passing(place: str) -> None:
        left[place] = left.get(place, 0) - 1
        if not left[place]:
            raise KeyboardInterrupt

    def redraw(first: Drawn, complete: list[bool]) -> Drawn:
        assert complete == [False] and first.draw.token_ids.tolist() == [NOT_FINAL]
        passing("redraw")
        return replace(first, draw=Draw(torch.tensor([FINAL])))

    begun: list[bool] = []
    step = RunningStep(drawn(lambda: passing("numbers") if begun else None), torch.device("cpu"), redraw, lambda: None)
    begun.append(True)
    with pytest.raises(KeyboardInterrupt):
        step.wait()
    output = step.wait()
    assert output is not None and output.token_ids == (FINAL,)
