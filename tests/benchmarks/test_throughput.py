"""What `benchmarks/throughput.py` says of figures: with runners that take no time worth measuring."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "throughput.py"


def runner(seconds: float) -> type:
    class Runner:
        def __init__(self, *_: Any) -> None: ...

        def run(self, _: Any) -> None:
            time.sleep(seconds)

        def close(self) -> None: ...

    return Runner


@pytest.mark.parametrize(("ours", "met"), [(0.001, True), (0.05, False)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_target_that_is_missed_is_an_exit_code(
    ours: float, met: bool, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("throughput", SCRIPT)
    assert spec is not None and spec.loader is not None
    throughput = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "throughput", throughput)  # where dataclasses look themselves up
    spec.loader.exec_module(throughput)
    monkeypatch.setattr(throughput, "MeshLM", runner(ours))
    monkeypatch.setattr(throughput, "PEERS", {"transformers": runner(0.02)})
    given = ["throughput.py", "--model", "x", "--rounds", "1", "--dtype", "float32", "--workload", "single"]
    monkeypatch.setattr("sys.argv", [*given, "--peer", "transformers", *["--json"] * as_json])
    assert throughput.main() == (0 if met else 1)
    out, err = capsys.readouterr()
    assert ("MISSED: single float32" in err) is not met
    if as_json:
        assert json.loads(out)["met"] is met
    else:
        assert "ratio" in out and ("MISSED" in out) is not met
    monkeypatch.setattr("sys.argv", given)
    assert throughput.main() == 0, "without a peer there is no target"
