"""`benchmarks/throughput.py` with runners that hold no model: what it says of figures, and that nothing survives it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUNNER = """
import os, signal, subprocess, sys, threading, time
import protocol, psutil
from protocol import Runner, answer

protocol.GRACE_S = 0.2

class Fake(Runner):
    def __init__(self, *words):
        {load}

    def run(self, prompts, num_new):
        {run}
        return [[0] * n for n in num_new]

    def close(self):
        {close}

answer(Fake, "torch")
"""
Write = Callable[..., Path]
Main = Callable[..., int]


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script, whose runners are those of `tmp_path`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS / "peers"))
    spec = importlib.util.spec_from_file_location("throughput", BENCHMARKS / "throughput.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "throughput", module)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SCRIPTS", tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, load: str = "pass", run: str = "pass", close: str = "pass") -> Path:
        path = tmp_path / f"run_{name}.py"
        path.write_text(RUNNER.format(load=load, run=run, close=close))
        return path

    return write


@pytest.fixture
def main(throughput: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Main:
    def main(*words: str) -> int:
        given = ["throughput.py", "--model", "x", "--rounds", "1", "--dtype", "float32", "--workload", "prefill"]
        monkeypatch.setattr("sys.argv", [*given, *words])
        return int(throughput.main())

    return main


def status(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "ended"


def assert_ends(*pids: int) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if status(pid) not in ("ended", psutil.STATUS_ZOMBIE)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{left} survived")
        time.sleep(0.02)


def pids_in(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()]


# a runner with a process of its own, both of which would rather stay
def stubborn(pids: Path) -> str:
    return f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=time.sleep, args=(1000,)).start()
        own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open({str(pids)!r}, "a").write(f"{{os.getpid()}} {{own.pid}} ")
    """


@pytest.mark.parametrize(("ours", "met"), [(0.001, True), (0.2, False)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_target_that_is_missed_is_an_exit_code(
    ours: float, met: bool, as_json: bool, write: Write, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    write("meshlm", run=f"time.sleep({ours})")
    write("transformers", run="time.sleep(0.05)")
    assert main("--peer", "transformers", *["--json"] * as_json) == (0 if met else 1)
    out, err = capsys.readouterr()
    assert ("MISSED: prefill float32" in err) is not met
    if as_json:
        assert json.loads(out)["met"] is met
        assert json.loads(out)["versions"].keys() == {"meshlm", "transformers"}
    else:
        assert "ratio" in out and ("MISSED" in out) is not met


def test_the_rate_of_a_decode_leaves_out_the_prefill_and_its_token(
    throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = throughput.WORKLOADS["single"](throughput.random.Random(0))
    runner = type("Runner", (), {"seconds": lambda self, prompts, num_new: 0.5 + sum(num_new)})()
    assert work.rate(runner) == 1  # token a second: 127 tokens in 128.5 - 1.5 s
    assert work.prompts != work.prefill and len(work.prompts[0]) == len(work.prefill[0])
    work = throughput.WORKLOADS["prefill"](throughput.random.Random(0))
    assert work.rate(runner) == 1024 / 1.5


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"load": "import no_such_engine"}, "skipped transformers float32: ModuleNotFoundError: No module named"),
        ({"load": "os._exit(3)"}, "skipped transformers float32: "),
        (
            {"run": "raise ValueError('two\\nlines')"},
            "left out transformers float32 from prefill on: ValueError: two lines",
        ),
        ({"run": "num_new = [0]"}, "drew [0] tokens where [1] were asked for"),
    ],
)
def test_a_peer_that_fails_is_left_out_with_the_reason(
    broken: dict[str, str], why: str, write: Write, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    write("meshlm")
    write("transformers", **broken)
    assert main("--peer", "transformers") == 0
    out, err = capsys.readouterr()
    assert why in err
    assert "meshlm" in out and "ratio" not in out


def test_a_peer_that_is_absent_is_left_out_and_one_unknown_refused(
    write: Write, main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("meshlm")
    assert main("--peer", f"openvino={tmp_path}/nowhere") == 0
    assert f"skipped openvino float32: there is no {tmp_path}/nowhere/bin/python" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main("--peer", "another")
    assert "no peer another" in capsys.readouterr().err


def test_ours_must_not_fail(throughput: ModuleType, write: Write, main: Main) -> None:
    write("meshlm", run="os._exit(1)")
    with pytest.raises(throughput.RunnerError):
        main()


def test_a_runner_that_does_not_answer_is_not_waited_for(
    write: Write, main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write("meshlm")
    write("transformers", run="print('busy', file=sys.stderr, flush=True); time.sleep(1000)")
    monkeypatch.setattr(sys.modules["peers.protocol"], "ANSWER_S", 0.3)
    monkeypatch.setattr(sys.modules["peers.protocol"], "GRACE_S", 0.1)
    assert main("--peer", "transformers") == 0
    assert "no answer in 0.3 s; its last words: busy" in capsys.readouterr().err


def test_what_another_runner_has_started_is_stopped_while_one_is_timed(
    throughput: ModuleType, write: Write, main: Main, tmp_path: Path
) -> None:
    pids, states = tmp_path / "pids", tmp_path / "states"
    write("meshlm", load=stubborn(pids))
    look = f"[psutil.Process(int(pid)).status() for pid in open({str(pids)!r}).read().split()]"
    write("transformers", run=f"time.sleep(0.2); print(*{look}, file=open({str(states)!r}, 'a'))")
    main("--peer", "transformers")
    assert states.read_text().split() == [psutil.STATUS_STOPPED] * 4  # of both, in two rounds
    assert_ends(*pids_in(pids))


@pytest.mark.parametrize(("number", "raised"), [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)])
def test_a_signal_ends_what_runs(
    number: str, raised: type[BaseException], write: Write, main: Main, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    write("transformers", load=stubborn(pids))
    write("meshlm", load=stubborn(pids), run=f"os.kill(os.getppid(), signal.{number}); time.sleep(0.2)")
    with pytest.raises(raised):
        main("--peer", "transformers")
    assert len(pids_in(pids)) == 4
    assert_ends(*pids_in(pids))


@pytest.mark.parametrize("busy", [False, True])
def test_no_runner_outlives_a_benchmark_that_is_killed(busy: bool, write: Write, tmp_path: Path) -> None:
    """Be it stopped, waiting for its turn, or at work on a request that takes for ever."""
    pids = tmp_path / "pids"
    script = write("fake", load=stubborn(pids), run="print('busy', file=sys.stderr); time.sleep(1000)")
    benchmark = f"""
        import os, sys, time
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from pathlib import Path
        from peers.protocol import Child
        child = Child(sys.executable, Path({str(script)!r}), "x", "float32", "1", environment=os.environ)
        child.wait_until_ready()
        child.stop()
        print("ready", flush=True)
        child.seconds([], []) if {busy} else time.sleep(1000)
    """
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS / "peers")}
    command = [sys.executable, "-c", textwrap.dedent(benchmark)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while (status(pids_in(pids)[0]) == psutil.STATUS_STOPPED) is busy and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # for every thread to stop: the kernel wakes a group that has stopped, not one about to
        process.kill()
    assert_ends(*pids_in(pids))
