"""What a pipeline's last stage tells the first."""

from array import array
from collections import deque
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.config import ConfigError
from meshlm.engine.drawn_tokens import DrawnTokens
from meshlm.engine.plan import check_fit, look_ahead
from meshlm.engine.rank_info import RankInfo
from meshlm.engine.step import SampleRequest, SampleSettings, StepInput
from meshlm.mesh.collectives import Communicator
from tiny import make_llama

CPU = torch.device("cpu")


class Wire:
    """From the last of three stages to the first; what arrives is there once somebody waits for it."""

    size = 3

    def __init__(self) -> None:
        self.sent: deque[Tensor] = deque()
        self.num_awaited = 0

    def isend(self, tensor: Tensor, dst: int) -> Any:
        assert dst == 0
        self.sent.append(tensor.clone())
        return self.Operation(self, None)

    def irecv(self, tensor: Tensor, src: int) -> Any:
        assert src == 2
        return self.Operation(self, tensor)

    class Operation:
        def __init__(self, wire: "Wire", tensor: Tensor | None) -> None:
            self.wire, self.tensor = wire, tensor

        def wait(self) -> Tensor | None:
            self.wire.num_awaited += 1
            return None if self.tensor is None else self.tensor.copy_(self.wire.sent.popleft())


def step(step_id: int, num_samples: int = 1, ahead_of: int = 0) -> StepInput:
    sample = SampleRequest(0, 1, SampleSettings(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0))
    return StepInput(
        step_id, array("q", [1]), (1,), (0,), (array("i", [0]),), (sample,) * num_samples, ahead_of=ahead_of
    )


def both(wire: Wire) -> tuple[DrawnTokens, DrawnTokens]:
    """Of the first stage and of the last."""
    pp = cast(Communicator, wire)
    return DrawnTokens(pp, 4, CPU), DrawnTokens(pp, 4, CPU)


def test_the_first_stage_waits_for_those_that_it_needs() -> None:
    first, last = both(wire := Wire())
    for number in range(1, 4):
        first.expect(step(number, number))
        last.keep(number, torch.full((number,), 10 * number))
        last.tell(number)
    assert wire.num_awaited == 0
    first.expect(step(4, ahead_of=2))
    assert first.of(step(4, ahead_of=2)).tolist() == [20, 20] and wire.num_awaited == 2
    assert first.of(step(4, ahead_of=2)).tolist() == [20, 20] and wire.num_awaited == 2
    assert len(first.of(step(5))) == 1 and wire.num_awaited == 2, "ahead of none"


def test_steps_without_a_draw_send_nothing() -> None:
    first, last = both(Wire())
    first.expect(step(1, 0))
    first.expect(step(2))
    last.keep(2, torch.tensor([5]))
    last.tell(2)
    assert first.of(step(3, ahead_of=2)).tolist() == [5]


def test_what_nobody_needs_does_not_pile_up() -> None:
    first, last = both(wire := Wire())
    for number in range(1, 50):
        first.expect(step(number))
        last.keep(number, torch.tensor([number]))
        last.tell(number)
        assert len(wire.sent) <= 5
    assert last.of(step(50, ahead_of=49)).tolist() == [49]


def test_a_mended_draw_takes_the_place_of_the_first() -> None:
    first, last = both(Wire())
    first.expect(step(1))
    last.keep(1, torch.tensor([3]))
    last.keep(1, torch.tensor([4]))
    last.tell(1)
    assert last.of(step(2, ahead_of=1)).tolist() == first.of(step(2, ahead_of=1)).tolist() == [4]


def test_a_mended_draw_reaches_the_first_stage() -> None:
    """Of a flat distribution the likeliest tokens are too few for top-p: the step ahead needs the right one."""
    model = make_llama(vocab_size=700, initializer_range=0.02)
    params = [SamplingParams(temperature=1.0, top_p=p, max_tokens=12, ignore_eos=True) for p in (1.0, 0.97, 0.9, 0.01)]
    prompts = [[5, 6, 7], list(range(10, 40)), [99] * 9, [1]]
    outputs = []
    for fields in ({}, {"pp_size": 2}):
        config = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=64, block_size=4, **fields)
        with InferenceEngine(model, config) as engine:
            assert engine._core.replicas[0].scheduler.look_ahead == bool(fields)
            outputs.append([output.token_ids for output in engine.generate(prompts, params, progress=False)])
    assert outputs[0] == outputs[1]


def rank(device: str) -> RankInfo:
    info = object.__new__(RankInfo)
    object.__setattr__(info, "device", device)
    return info


@pytest.mark.parametrize(
    ("fields", "device", "looks"),
    [
        ({}, "cpu", False),
        ({}, "cuda:0", True),
        ({"tp_size": 2}, "cpu", True),
        ({"pp_size": 2}, "cpu", True),
        ({"pp_size": 2}, "cuda:0", False),
        ({"pp_size": 2, "async_scheduling": False}, "cpu", False),
        ({"async_scheduling": True}, "cpu", True),
    ],
    ids=str,
)
def test_who_looks_ahead(fields: dict[str, Any], device: str, looks: bool) -> None:
    assert look_ahead(InferenceConfig(**fields), [rank(device)]) is looks


def test_stages_on_gpus_do_not_look_ahead() -> None:
    config = InferenceConfig(pp_size=2, async_scheduling=True)
    with pytest.raises(ConfigError) as error:
        check_fit(config, cast(Any, None), [torch.device("cuda:0"), torch.device("cuda:1")])
    assert str(error.value) == (
        "InferenceConfig.async_scheduling: True needs pp_size=1 on GPUs, and pp_size=2: that many steps run at once"
    )
