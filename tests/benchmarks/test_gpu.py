"""The benchmarks for GPUs: at toy size from end to end, and what they say of figures."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module."""
    name = request.param
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where it finds `measuring`
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def whole_models(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Modules of that folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"whole_models.{name}")


def run(tmp_path: Path, *arguments: str) -> tuple[list[str], dict[str, Any]]:
    """A script's output and the JSON that it wrote; it must end well."""
    name, *options = arguments
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--toy", "--device", "cpu", *options]
    # Interpreted kernels only where the script asks for them.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "OMP_NUM_THREADS": "1"
    }
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (written,) = tmp_path.glob("*.json")
    (table,) = tmp_path.glob("*.txt")
    assert result.stdout.endswith(table.read_text()), "the table comes last"
    return result.stdout.splitlines(), json.loads(written.read_text())


def check_kernels(lines: list[str], result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert {row["group"] for row in rows} == {"rows", "decode", "prefill"}
    assert all(row["seconds"] > 0 and row["of_limit"] > 0 and "eager" in row["peers"] for row in rows), rows
    assert result["met"] is None and all(row["met"] is None for row in rows)
    assert lines[-1] == "toy sizes: targets are not judged"
    for row in rows:
        assert any(line.startswith(row["kernel"]) and row["shape"] in line for line in lines)


def test_kernels(tmp_path: Path) -> None:
    lines, result = run(tmp_path, "kernels")
    check_kernels(lines, result)
    assert result["attention"] in ("cpu", "eager")


@pytest.mark.slow
def test_kernels_in_tritons_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    lines, result = run(tmp_path, "kernels", "--implementation", "triton")
    check_kernels(lines, result)
    assert (result["ops"], result["attention"]) == ("triton", "triton")


@pytest.mark.slow
def test_gpu(tmp_path: Path) -> None:
    lines, result = run(tmp_path, "gpu", "--profile")
    measured = {(found["model"], found["engine"], found["workload"]) for found in result["results"]}
    workloads = {
        "meshlm": ("decode", "prefill 20", "prefill 48", "6 requests"),
        "generate": ("decode", "prefill 20", "prefill 48"),
        "continuous": ("6 requests",),
    }
    models = ("llama", "qwen")
    assert measured == {(m, engine, w) for m in models for engine, names in workloads.items() for w in names}, result
    assert all(found["tokens_per_s"] > 0 and not found["cut"] for found in result["results"])
    assert all(line["ratio"] > 0 and line["met"] is None for line in result["lines"])
    assert len(result["profiles"]) == 2 and all(profile["kernels"] for profile in result["profiles"])
    assert result["met"] is None and lines[-1] == "toy sizes: targets are not judged"


@pytest.mark.parametrize("script", ["kernels"], indirect=True)
def test_what_a_kernel_reaches_is_judged(script: ModuleType) -> None:
    norm = {"group": "rows", "kernel": "rms_norm", "shape": "4096 x 4096", "unit": "GB/s", "work": 4e6}
    fast = script.Row(**norm, seconds=1e-6, of_limit=0.9, peers={"eager": 3e-6}, target=("of limit", 0.85))
    slow = script.Row(**norm, seconds=1e-6, of_limit=0.8, peers={}, target=("of limit", 0.85))
    failed = script.Row(**norm, failures={"ours": "RuntimeError: no"}, target=("of limit", 0.85))
    peers = {"eager": 3e-3, "flash": 5e-4, "cudnn": 4e-4}
    prefill = {"group": "prefill", "kernel": "paged prefill", "shape": "1 x 2048", "unit": "TFLOP/s", "work": 1e9}
    near = script.Row(**prefill, seconds=8e-4, of_limit=0.3, peers=peers, target=("x flash", 0.6))
    far = script.Row(**prefill, seconds=9e-4, of_limit=0.3, peers=peers, target=("x flash", 0.6))
    alone = script.Row(**prefill, seconds=9e-4, of_limit=0.3, target=("x flash", 0.6))
    rows = [fast, slow, failed, near, far, alone]
    assert [row.met for row in rows] == [True, False, False, True, False, None]
    assert near.best == "cudnn" and near.times("eager") == pytest.approx(3.75)
    verdicts = [line.rpartition(": ")[2] for line in script.table(rows, judged=True)[1:]]
    assert verdicts == ["ok", "MISSED", "no", "ok", "MISSED", "no peer"]


def test_what_an_engine_reaches_is_judged(whole_models: Callable[[str], ModuleType]) -> None:
    report, tasks = whole_models("report"), whole_models("tasks")

    def line(model: str, workload: str, **rates: float | None) -> Any:
        of_limit = 0.86 if workload == "decode" else None
        found = {name: tasks.Result(model, name, workload, rate, of_limit=of_limit) for name, rate in rates.items()}
        return report.Line(model, workload, found)

    lines = [
        line("llama", "decode", meshlm=200.0, generate=100.0),
        line("qwen", "decode", meshlm=800.0, generate=900.0),
        line("llama", "256 requests", meshlm=9000.0, continuous=3000.0),
        line("llama", "256 requests", meshlm=9000.0, continuous=3100.0),
        line("llama", "256 requests", meshlm=9000.0),
        line("llama", "256 requests", continuous=3000.0),
    ]
    assert [each.met for each in lines] == [True, None, True, False, None, False]
    assert lines[0].ratio == 2.0
    verdicts = [text.rpartition(": ")[2] for text in report.table(lines, tasks.MODELS, judged=True)[1:]]
    assert verdicts[2:] == ["ok", "MISSED", "no figure to compare with", "MISSED"] and verdicts[0] == "ok"


def test_a_token_reads_all_weights_but_an_embedding_table(whole_models: Callable[[str], ModuleType]) -> None:
    models = whole_models("tasks").MODELS
    llama, qwen = models["llama"], models["qwen"]
    assert llama.bytes_per_token(16_060_522_496, 0, 2) == 16_060_522_496 - 2 * 128256 * 4096
    assert qwen.bytes_per_token(1_000_000, 10, 2) == 1_000_000 + 10 * 2 * 2 * 28 * 8 * 128


def test_gaps_are_what_no_kernel_covers(whole_models: Callable[[str], ModuleType]) -> None:
    trace = whole_models("trace")
    spans = [trace.Span(*span) for span in (("a", 0, 10), ("b", 5, 8), ("a", 12, 14), ("b", 14, 20), ("a", 25, 26))]
    found = trace.summary(spans, num_steps=2)
    assert (found["busy_us"], found["idle_us"], found["launches"]) == (9.5, 3.5, 2.5)
    assert found["kernels"] == [("a", 6.5, 1.5), ("b", 4.5, 1.0)]
    assert found["gaps"] == [("b -> a", 2.5, 0.5), ("a -> a", 1.0, 0.5)]


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.py"
    found = json.dumps({"kind": "note", "value": "found"})
    slow.write_text(
        f"import sys, time\nopen(sys.argv[4], 'w').write({found!r} + chr(10) + 'half a li')\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(script, "__file__", str(slow))
    task = script.Task("llama", ("meshlm",), "cpu", True, 0.0, None, "auto", 1)
    lines = script.run_in_child([task], timeout_s=1.0)
    assert [line["value"] for line in lines] == [
        "found",
        "toy Llama, meshlm: ended after 1 s: what is missing had no time",
    ]


@pytest.mark.parametrize("engine", ["meshlm", "continuous"])
@pytest.mark.slow
def test_requests_that_take_too_long_are_cut(
    whole_models: Callable[[str], ModuleType], engine: str, one_thread: None
) -> None:
    task = whole_models("tasks").Task("llama", (engine,), "cpu", True, time.time() + 60, None, "auto", 1)
    runner = whole_models("engines").ENGINES[engine](task)
    try:
        runner.prepare("requests")
        started = time.perf_counter()
        count = runner.requests([[1, 2, 3], [4, 5, 6]], [900, 900], 0.05)
        assert 0 < count < 1800 and time.perf_counter() - started < 5
    finally:
        runner.close()
