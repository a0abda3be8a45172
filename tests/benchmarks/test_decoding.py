"""What `benchmarks/decoding.py` says of figures, with engines that only pretend; and that it drives a real one."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from tiny import make_llama

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))  # where it finds measuring.py
    spec = importlib.util.spec_from_file_location("decoding", FOLDER / "decoding.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "decoding", module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("measuring", None)


def pretended(costs: dict[str, float], names: Callable[[Any], str]) -> type:
    """A lane whose greedy steps take 10 ms, but every third takes five times as long, whichever lane it is in."""

    class Lane:
        count = 0

        def __init__(self, *_: Any) -> None: ...

        def begin(self, prompts: Any, feature: Any, num_tokens: int) -> None:
            assert len(prompts) == 4
            self.seconds = 0.010 * (1 + costs.get(names(feature), 0.0))

        def step(self) -> float:
            Lane.count += 1
            return self.seconds * (5 if Lane.count % 6 in (1, 2) else 1)  # a pair

        def end(self) -> None: ...

        def close(self) -> None: ...

    return Lane


@pytest.mark.parametrize(("cost", "met"), [(0.09, True), (0.11, False)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_bound_that_is_missed_is_an_exit_code(
    cost: float,
    met: bool,
    as_json: bool,
    decoding: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {id(feature): name for name, feature in decoding.FEATURES.items()}
    costs = {"penalties": cost, "processor": 0.5}
    monkeypatch.setattr(decoding, "Lane", pretended(costs, lambda feature: names.get(id(feature), "greedy")))
    given = ["--model", "x", "--feature", "same", "penalties", "processor", "--dtype", "float32", "--batch", "4"]
    monkeypatch.setattr("sys.argv", ["decoding.py", *given, *["--json"] * as_json])
    assert decoding.main() == (0 if met else 1)
    out, err = capsys.readouterr()
    assert ("MISSED: penalties float32" in err) is not met and "processor" not in err
    if as_json:
        found = json.loads(out)
        assert found["met"] is met and found["batch"] == 4
        assert [row["cost"] for row in found["rows"]] == pytest.approx([0, cost, 0.5])
        assert [row["greedy_ms"] for row in found["rows"]] == pytest.approx([10, 10, 10])
    else:
        assert f"+{100 * cost:.1f} %" in out and ("MISSED" in out) is not met


def test_every_feature_runs(decoding: Any) -> None:
    """All but structured output, which takes a tokenizer."""
    for feature in decoding.FEATURES.values():
        SamplingParams(**feature.params)
    model = make_llama(vocab_size=700, max_position_embeddings=128)
    config = InferenceConfig(device="cpu", dtype="float32", max_num_seqs=3, num_kv_blocks=64, block_size=16)
    ticks = iter(range(10**6))
    lanes = [decoding.Lane(model, config, lambda: float(next(ticks))) for _ in range(2)]
    names = [name for name in decoding.FEATURES if name != "structured"]
    rows = decoding.measure(lanes, "float32", names, batch=3, rounds=1, num_steps=2)
    assert [row.feature for row in rows] == names
    assert all((row.step_ms, row.greedy_ms, row.cost) == (1000, 1000, 0) for row in rows)
    for lane in lanes:
        assert isinstance(lane.engine, InferenceEngine) and not lane.engine.has_unfinished()
        lane.engine.check()
        lane.close()
