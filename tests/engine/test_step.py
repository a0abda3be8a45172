"""Steps as messages."""

import pickle
from array import array
from multiprocessing.reduction import ForkingPickler

import pytest

from meshlm.engine.logits_spec import LogitsSpec
from meshlm.engine.step import (
    GivenRows,
    HistoryUpdate,
    Masks,
    PooledRows,
    SampleRequest,
    SampleSettings,
    StepInput,
)

GREEDY = SampleSettings(0, 0.0, 0, 1.0, 0.0)
DRAWN = SampleSettings(2**63 - 1, 0.8, 40, 0.9, 0.1, slot=3, forced=7, logprobs=-1, num_candidates=2)

STEPS = {
    "decodes": StepInput(
        5,
        array("q", [17, -1]),
        (1, 1),
        (30, 0),
        (array("i", [4, 9]), array("i", [2**31 - 1])),
        (SampleRequest(0, 31, GREEDY), SampleRequest(1, 1, GREEDY)),
        ahead_of=4,
    ),
    "all": StepInput(
        6,
        array("q", [2**40, 1, 2, 3]),
        (3, 1),
        (0, 8),
        (array("i", [1]), array("i", [1, 2, 3])),
        (SampleRequest(2, 3, DRAWN), SampleRequest(3, 9, GREEDY)),
        copies=((1, 2), (3, 4)),
        histories=(HistoryUpdate(3, 1, array("q", [5, -1]), LogitsSpec()),),
        masks=Masks((0,), b"1234"),
        given=(GivenRows(0, array("q", [1, 2]), 3),),
        pooled=(PooledRows(0, 2),),
        model=1,
    ),
    "nothing drawn": StepInput(7, array("q", [1, 2]), (2,), (0,), (array("i", [1]),), ()),
    "nothing": StepInput(8, array("q"), (), (), (), ()),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_step_arrives_as_it_was_sent(step: StepInput) -> None:
    for asked in (False, True):  # what it keeps once it is asked goes along
        if asked:
            assert step.draws_after_all in (True, False)
        arrived = pickle.loads(ForkingPickler.dumps(step))
        assert arrived == step and arrived.draws_after_all == step.draws_after_all
        assert [table.typecode for table in arrived.block_tables] == ["i"] * len(step.block_tables)
        assert arrived.token_ids.typecode == "q"
        assert all(isinstance(sample.settings, SampleSettings) for sample in arrived.samples)
