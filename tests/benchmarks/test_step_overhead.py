"""`benchmarks/step_overhead.py` and `benchmarks/startup.py` run: with a tiny model or none, and no regard for times."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import make_llama

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_the_parts_of_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    overhead = script("step_overhead")
    monkeypatch.setattr(overhead, "demo_model_path", lambda: make_llama(vocab_size=1000))
    monkeypatch.setattr(overhead, "str", lambda model: model, raising=False)
    monkeypatch.setattr(overhead, "PROMPTS", [[5, 6, 7], [8]])
    monkeypatch.setattr(overhead, "TARGET_MS", 0.0)
    monkeypatch.setattr(sys, "argv", ["step_overhead.py", "--batch", "3", "--steps", "4", "--rounds", "2", "--json"])
    assert overhead.main() == 1, "nothing takes no time"
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["draw"] for result in results] == list(overhead.DRAWS)
    for ms in (result["ms"] for result in results):
        assert all(value > 0 for value in ms.values()), ms
        assert ms["step"] > ms["rest"]


def test_start_up_is_compared_with_its_targets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    startup = script("startup")
    times = iter([[9.0, 9.0]] * 3 + [[0.1, 0.5], [4.0, 1.0], [9.5, 1.0]])
    monkeypatch.setattr(startup, "measure", lambda *arguments: next(times))
    monkeypatch.setattr(sys, "argv", ["startup.py", "--model", "-", "--rounds", "1"])
    assert startup.main() == 1
    assert [line.count("MISSED") for line in capsys.readouterr().out.splitlines()] == [0, 0, 1]
