"""What `benchmarks/mesh_scaling.py` says of figures, with ones that were not measured."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mesh_scaling.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("mesh_scaling", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mesh_scaling", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("ratio", "us", "missed"), [(1.0, 2.0, 0), (0.5, 2.0, 4), (1.0, 50.0, 1), (1.0, None, 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_target_that_is_missed_is_an_exit_code(
    ratio: float,
    us: float | None,
    missed: int,
    as_json: bool,
    benchmark: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def decode_all(model: str, dtype: str, meshes: list[str], batches: list[int], *_: int) -> list[dict[str, Any]]:
        names = [benchmark.ONE, *meshes]
        figures = {"dtype": dtype, "ratio": ratio, "tokens_per_s": 50.0, "busy": [0.9]}
        return [{"mesh": name, "batch": batch, **figures} for name in names for batch in batches]

    def collectives(dtype: str, rounds: int) -> list[dict[str, Any]]:
        shared = {} if us is None else {"shared memory": us}
        return [{"operation": "all-reduce", "dtype": dtype, **shared, "gloo": 400.0}]

    monkeypatch.setattr(benchmark, "decode_all", decode_all)
    monkeypatch.setattr(benchmark, "collectives", collectives)
    monkeypatch.setattr("sys.argv", [SCRIPT.name, "--model", "x", "--dtype", "float32", *["--json"] * as_json])
    assert benchmark.main() == (1 if missed else 0)
    out, err = capsys.readouterr()
    assert err.count("MISSED") == missed
    if as_json:
        assert json.loads(out)["met"] is (not missed)
    else:
        assert out.count("MISSED") == missed and out.count(" ok\n") == 5 - missed
