"""`benchmarks/binding.py` runs: with a tiny model, and no regard for times."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "binding.py"


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("binding", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "binding", module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "demo_model_path", lambda: make_llama(vocab_size=1000, max_position_embeddings=128))
    return module


def test_a_row_for_each_dtype_and_batch(
    binding: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["binding.py", "--num-steps", "3", "--num-seqs", "1", "2", "--dtype", "float32", "bfloat16"]
    monkeypatch.setattr("sys.argv", [*given, "--json"])
    assert binding.main() == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["dtype"], row["num_seqs"]) for row in rows] == [
        (d, n) for d in ("float32", "bfloat16") for n in (1, 2)
    ]
    assert all(row["bound_ms"] > 0 and row["looked_up_ms"] > 0 and row["chosen_ms"] > 0 for row in rows)
    assert all(row["looked_up_saved"] < 1 and row["chosen_saved"] < 1 for row in rows)
    monkeypatch.setattr("sys.argv", [*given[:4], "1", "--dtype", "float32"])
    assert binding.main() == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["dtype", "sequences", "bound"] and row.split()[:2] == ["float32", "1"]
    assert row.count("%") == 3
