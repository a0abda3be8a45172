"""The driver's loop over an executor that fails when it is told to."""

from collections import deque
from typing import Any, cast

import pytest

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine.core import EngineCore
from meshlm.engine.executor import Executor
from meshlm.engine.logits_spec import LogitsSpec
from meshlm.engine.prompts import PreparedRequest
from meshlm.engine.step import StepInput, StepOutput


class Pipeline:
    """Draws token 7, always. failure: what submissions raise from the third on."""

    def __init__(self) -> None:
        self.steps: deque[tuple[int, StepInput]] = deque()
        self.failure: BaseException | None = None
        self.num_submitted = 0

    def submit(self, replica: int, step: StepInput) -> None:
        self.num_submitted += 1
        if self.failure is not None and self.num_submitted > 2:
            raise self.failure
        self.steps.append((replica, step))

    def collect(self) -> tuple[int, StepOutput]:
        replica, step = self.steps.popleft()
        return replica, StepOutput(step.step_id, (7,) * len(step.samples))


def core_of(
    pp_size: int, max_tokens: int, count: int = 2, look_ahead: bool = False, **values: Any
) -> tuple[EngineCore, Pipeline]:
    pipeline = Pipeline()
    config = InferenceConfig(pp_size=pp_size)
    core = EngineCore(cast(Executor, pipeline), config, num_blocks=64, block_size=4, look_ahead=look_ahead)
    settled: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
    for index in range(count):
        request = PreparedRequest(None, [1, 2, 3], SamplingParams(**settled), max_tokens, LogitsSpec())
        core.add(str(index), index, request, seed=0, new_detokenizer=lambda: None)
    return core, pipeline


@pytest.mark.parametrize(("pp_size", "under_way"), [(1, 0), (2, 2)])
def test_a_pipeline_is_full_when_a_step_returns(pp_size: int, under_way: int) -> None:
    core, pipeline = core_of(pp_size, max_tokens=8)
    for _ in range(5):
        assert core.step()
        assert len(pipeline.steps) == under_way
    core.check()


def test_what_a_step_moved_comes_before_a_failure() -> None:
    core, pipeline = core_of(pp_size=2, max_tokens=2)
    pipeline.failure = OSError("gone")
    assert [request.request_id for request in core.step()] == ["0"]
    with pytest.raises(OSError, match="gone"):
        core.step()


def test_what_a_step_moved_is_not_lost_by_an_interrupt() -> None:
    core, pipeline = core_of(pp_size=2, max_tokens=2)
    pipeline.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        core.step()
    pipeline.failure = None
    assert [request.request_id for request in core.step()] == ["0", "1"]


def test_without_a_pipeline_nothing_goes_off_meanwhile() -> None:
    core, pipeline = core_of(pp_size=1, max_tokens=2)
    core.step()
    assert pipeline.num_submitted == 1


def test_a_step_under_way_for_nobody_is_waited_for() -> None:
    core, pipeline = core_of(pp_size=1, max_tokens=8, look_ahead=True, stop_token_ids=[7])
    assert all(request.ended for request in core.step())
    assert len(pipeline.steps) == 1 and not core.has_unfinished
    core.settle()
    core.check()
    (replica,) = core.stats().replicas
    assert not pipeline.steps and replica.num_free_blocks == replica.num_blocks


def test_others_steps_are_not_waited_for() -> None:
    core, pipeline = core_of(pp_size=2, max_tokens=8)
    core.step()
    core.settle()
    assert len(pipeline.steps) == 2


def test_once_all_have_ended_no_block_is_held(tiny_engine: InferenceEngine) -> None:
    """Whatever ended them: `tiny_engine` looks."""
    prompts = [[5, 6, 7], [8, 9]]
    free = tiny_engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8), progress=False)
    stops = [SamplingParams(temperature=0, max_tokens=9, stop_token_ids=[output.token_ids[4]]) for output in free]
    assert all(output.finish_reason == "stop" for output in tiny_engine.generate(prompts, stops, progress=False))
