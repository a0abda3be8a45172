"""One engine in three worlds: how ranks start, fail, are interrupted, and end; nothing is left behind.

A tiny random Llama, whose right answers transformers gives; what a user's own process goes through runs as a script.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers

from meshlm import InferenceConfig, InferenceEngine
from meshlm.engine import plan, world
from meshlm.engine.executor import MeshExecutor
from meshlm.engine.rank import Published
from meshlm.engine.step import StepInput
from meshlm.engine.world import World
from meshlm.mesh import interrupts, own_ranks
from meshlm.mesh.launch import RankFailure
from meshlm.shardformer import open_checkpoint
from meshlm.shardformer.shard import Shards, split_layers, stage_bytes
from tiny import make_llama

pytestmark = pytest.mark.timeout(180)

PROMPT = [5, 6, 7]
VOCAB_SIZE = 256
COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 2048, "block_size": 16}
FOREVER = {"temperature": 0.0, "max_tokens": 30_000, "ignore_eos": True}  # minutes
SOON_S = 5.0  # in which a failure must be told


# ---- the model and what is right ---------------------------------------------------------------------------------


def make_module(seed: int) -> transformers.LlamaForCausalLM:
    return make_llama(
        seed,
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=4,
        max_position_embeddings=32_768,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def module() -> transformers.LlamaForCausalLM:
    return make_module(seed=0)


@pytest.fixture(scope="module")
def tiny(module: transformers.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    module.save_pretrained(folder)
    return folder


def by_transformers(module: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    given = torch.tensor([list(prompt)])
    made = module.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return list(made[0, len(prompt) :].tolist())


def greedy(num_tokens: int) -> dict[str, Any]:
    """Transformers' min_new_tokens forbids the end token, and so does this."""
    return {"temperature": 0.0, "max_tokens": num_tokens, "min_tokens": num_tokens}


def answers_rightly(engine: InferenceEngine, module: Any) -> None:
    (output,) = engine.generate([PROMPT], greedy(8), progress=False)
    assert list(output.token_ids) == by_transformers(module, PROMPT, 8)
    engine.check()


# ---- processes, ports, files -------------------------------------------------------------------------------------


def alive(pids: Sequence[int]) -> list[int]:
    def is_alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if is_alive(pid)]


def gone_within(seconds: float, pids: Sequence[int]) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def listening_ports(pids: Sequence[int]) -> list[int]:
    """The ports that these processes listen on; for their own host only."""
    connections = [c for pid in pids for c in psutil.Process(pid).net_connections("inet")]
    addresses = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in addresses} == {"127.0.0.1"}, addresses
    return sorted(address.port for address in addresses)


def closed_within(seconds: float, ports: Sequence[int]) -> bool:
    """Not at once: a process counts as gone while its last threads end."""

    def is_open(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + seconds
    while any(map(is_open, ports)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def shared_memory_of(pids: Sequence[int]) -> list[str]:
    """Files in memory that these processes have open or mapped; those without a name count where they hold weights."""
    found = []
    for pid in pids:
        process = Path(f"/proc/{pid}")
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists the folder
                found.append(os.readlink(fd))
        found += [line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line]
    named = {name for name in found if name.startswith("/dev/shm/") and not name.endswith(" (deleted)")}
    return sorted(named | {name for name in found if name.startswith("/memfd:meshlm (")})


def pids_of(engine: InferenceEngine) -> list[int]:
    return [rank.pid for rank in engine.ranks]


@contextlib.contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


# ---- scripts -----------------------------------------------------------------------------------------------------

# Without a __main__ guard, as all scripts here.
START = """
import json, os, signal, sys, threading, time
from meshlm import InferenceConfig, InferenceEngine

def start(**sizes):
    return InferenceEngine({model!r}, InferenceConfig(**{common!r}, **sizes))

def say(**values):
    print(json.dumps(values), flush=True)

def answer(engine):
    return engine.generate([{prompt!r}], {params!r}, progress=False)[0].token_ids

def pids_of(engine):
    return [rank.pid for rank in engine.ranks]
"""


def write_script(folder: Path, model: Path, text: str) -> Path:
    script = folder / "script.py"
    start = START.format(model=str(model), common=COMMON, prompt=PROMPT, params=greedy(8))
    script.write_text(start + text)
    return script


Finished = subprocess.CompletedProcess[str]


def run_python(*arguments: str, given: str = "", timeout: float = 90, **environment: str) -> Finished:
    command, environment = [sys.executable, *arguments], os.environ | environment
    return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, timeout=timeout)


def said(run: Finished) -> list[Any]:
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@dataclass
class Running:
    """A script under way, in a session of its own as if in a terminal."""

    process: subprocess.Popen[str]

    def hear(self) -> Any:
        """The next thing that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)


@contextlib.contextmanager
def running(*command: str, **environment: str) -> Iterator[Running]:
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Running(process)
    finally:
        process.kill()
        process.communicate()


# ---- plain Python ------------------------------------------------------------------------------------------------


def test_a_script_without_a_main_guard(tmp_path: Path, tiny: Path, module: Any) -> None:
    text = """
engine = start(tp_size=2)
models = [name for name in sys.modules if "modeling_llama" in name]
say(pids=pids_of(engine), driver=os.getpid(), token_ids=answer(engine), models=models)
sys.stdin.readline()
"""
    script = write_script(tmp_path, tiny, text)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        report = json.loads(line)
        pids = report["pids"]
        assert report["token_ids"] == by_transformers(module, PROMPT, 8)
        assert report["models"] == [], "transformers' code of a model takes a second to import, and we have our own"
        assert len(set(pids)) == 2 and report["driver"] not in pids
        assert sorted(child.pid for child in psutil.Process(process.pid).children(recursive=True)) == sorted(pids)
        ports = listening_ports([process.pid, *pids])
        assert shared_memory_of([process.pid, *pids]) == []
        started = time.monotonic()
        out, err = process.communicate("\n", timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
        assert time.monotonic() - started < SOON_S
        assert gone_within(0, pids)
        assert ports and closed_within(SOON_S, ports)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow  # several engines on two ranks
def test_every_way_to_end(tmp_path: Path, tiny: Path) -> None:
    """The ranks are gone when close, with, del or an exception in with are done, and after the interpreter's exit."""
    text = """
def ranks(engine):
    global pids
    pids = pids_of(engine)
    return answer(engine)

def is_alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False

def left():
    return [pid for pid in pids if is_alive(pid)]

with start(tp_size=2) as engine:
    ranks(engine)
say(way="with", left=left())

try:
    with start(tp_size=2) as engine:
        ranks(engine)
        1 / 0
except ZeroDivisionError:
    say(way="exception in with", left=left())

engine = start(pp_size=2)
ranks(engine)
engine.close()
say(way="close", left=left())
engine.close()
try:
    answer(engine)
except RuntimeError as error:
    say(way="use after close", left=left(), error=str(error))

engine = start(dp_size=2)
ranks(engine)
del engine
say(way="del", left=left())

engine = start(tp_size=2)
stream = engine.stream([[5, 6, 7]], {"max_tokens": 1000})
next(stream)
say(way="exit", left=[], pids=pids_of(engine))
"""
    run = run_python(str(write_script(tmp_path, tiny, text)), timeout=170)
    reports = said(run)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    assert [report["way"] for report in reports] == [
        "with",
        "exception in with",
        "close",
        "use after close",
        "del",
        "exit",
    ]
    assert all(report["left"] == [] for report in reports), reports
    assert "the engine is closed" in reports[3]["error"]
    assert gone_within(0, reports[-1]["pids"])


@pytest.mark.slow
def test_an_uncaught_exception_ends_the_ranks(tmp_path: Path, tiny: Path) -> None:
    script = write_script(tmp_path, tiny, "engine = start(tp_size=2)\nsay(pids=pids_of(engine))\n1 / 0\n")
    run = run_python(str(script))
    assert run.returncode == 1 and run.stderr.count("Traceback") == 1 and "ZeroDivisionError" in run.stderr
    assert gone_within(0, said(run)[0]["pids"])


@pytest.mark.slow
def test_a_repl(tmp_path: Path, tiny: Path, module: Any) -> None:
    start = START.format(model=str(tiny), common=COMMON, prompt=PROMPT, params=greedy(8)).strip()
    given = start + "\n\nengine = start(pp_size=2)\nsay(pids=pids_of(engine), token_ids=answer(engine))\n"
    run = run_python("-i", "-q", given=given, PYTHON_BASIC_REPL="1")
    assert run.returncode == 0, run.stderr
    (report,) = said(run)
    assert report["token_ids"] == by_transformers(module, PROMPT, 8), run.stderr
    assert "Traceback" not in run.stderr and "[rank" not in run.stderr
    assert gone_within(0, report["pids"])


@pytest.mark.slow
@pytest.mark.parametrize(("busy", "pp_size"), [(True, 2), (False, 1)], ids=["generating", "idle"])
def test_kill_9_of_the_driver(busy: bool, pp_size: int, tmp_path: Path, tiny: Path) -> None:
    text = f"""
engine = start(tp_size=2, pp_size={pp_size})
answer(engine)
say(pids=pids_of(engine))
engine.generate([[5, 6, 7]] * 2, {FOREVER}, progress=False) if {busy} else time.sleep(600)
"""
    with running(sys.executable, str(write_script(tmp_path, tiny, text))) as script:
        pids = script.hear()["pids"]
        time.sleep(0.5)
        assert alive(pids) == pids
        ports = listening_ports([script.process.pid, *pids])
        script.process.kill()
        assert gone_within(SOON_S, pids)
        script.process.wait()
        assert ports and closed_within(SOON_S, ports)


def children_of(pid: int, at_least: int) -> list[int]:
    """As soon as there are so many: one imports what ranks need, two are the ranks that it has forked."""
    driver, deadline = psutil.Process(pid), time.monotonic() + 30
    while len(found := driver.children(recursive=True)) < at_least:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [child.pid for child in found]


@pytest.mark.slow
@pytest.mark.parametrize("at_least", [1, 2])
def test_kill_9_of_the_driver_while_ranks_start(at_least: int, tmp_path: Path, tiny: Path) -> None:
    script_file = write_script(tmp_path, tiny, "say(starting=True)\nengine = start(tp_size=2)\n")
    with running(sys.executable, str(script_file)) as script:
        script.hear()
        pids = children_of(script.process.pid, at_least)
        script.process.kill()
        assert gone_within(30, pids)  # they see it once torch is imported: a matter of seconds where nothing else runs


@pytest.mark.slow
def test_ctrl_c_ends_a_script_with_one_traceback(tmp_path: Path, tiny: Path) -> None:
    text = f"""
engine = start(tp_size=2)
answer(engine)
say(pids=pids_of(engine))
engine.generate([[5, 6, 7]] * 2, {FOREVER}, progress=False)
"""
    with running(sys.executable, str(write_script(tmp_path, tiny, text))) as script:
        pids = script.hear()["pids"]
        time.sleep(0.5)
        os.killpg(script.process.pid, signal.SIGINT)  # as a terminal does
        out, err = script.process.communicate(timeout=20)
        assert gone_within(0, pids)
        assert script.process.returncode == -signal.SIGINT
        assert out == "" and err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt")
        assert "rank" not in err


@pytest.mark.slow
@pytest.mark.parametrize("at_least", [1, 2])
def test_ctrl_c_while_ranks_start(at_least: int, tmp_path: Path, tiny: Path) -> None:
    script_file = write_script(tmp_path, tiny, "say(starting=True)\nengine = start(tp_size=2)\n")
    with running(sys.executable, str(script_file)) as script:
        script.hear()
        pids = children_of(script.process.pid, at_least)
        os.killpg(script.process.pid, signal.SIGINT)
        _, err = script.process.communicate(timeout=20)
        assert gone_within(0, pids)
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}, {}], ids=str)
def test_ctrl_c_that_is_caught_leaves_the_engine_usable(
    sizes: dict[str, int], tmp_path: Path, tiny: Path, module: Any
) -> None:
    text = f"""
import random
engine = start(**{sizes})
interrupts = 0
for moment in range(8):
    timer = threading.Timer(0.2 + 0.1 * random.random(), os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        engine.generate([[5, 6, 7], [8, 9], list(range(2, 90))], {FOREVER}, progress=False)
    except KeyboardInterrupt:
        interrupts += 1
    engine.check()
    replica = engine.stats().replicas[0]
    say(interrupts=interrupts, token_ids=answer(engine), unfinished=engine.has_unfinished(), left=engine.step(),
        held=replica.num_waiting + replica.num_running)
    replica = engine.stats().replicas[0]
    assert replica.num_free_blocks == replica.num_blocks
"""
    run = run_python(str(write_script(tmp_path, tiny, text)))
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    reports = said(run)
    assert [report["interrupts"] for report in reports] == list(range(1, 9))
    expected = by_transformers(module, PROMPT, 8)
    for report in reports:
        assert report["token_ids"] == expected
        assert (report["unfinished"], report["left"], report["held"]) == (False, [], 0)


# ---- an engine that is closed in the midst of work ---------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, pytest.param({"tp_size": 2}, marks=pytest.mark.slow)], ids=str)
def test_close_while_working(sizes: dict[str, int], tiny: Path) -> None:
    """By the caller between two items, and by another thread within a step."""
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, **sizes))
    late, stream = engine.stream([PROMPT], FOREVER), engine.stream([PROMPT], FOREVER)
    next(stream)
    engine.close()
    for items in (stream, late):
        with pytest.raises(RuntimeError, match=r"^the engine is closed; make a new InferenceEngine$"):
            next(items)
        assert next(items, None) is None

    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, **sizes))
    with after(0.3, engine.close), pytest.raises(RuntimeError, match=r"^the engine is closed; make a new"):
        engine.generate([PROMPT], FOREVER, progress=False)


# ---- a rank that dies --------------------------------------------------------------------------------------------


@pytest.mark.slow  # starts ranks, as all below
@pytest.mark.parametrize(
    ("sizes", "victim", "place"),
    [
        ({"tp_size": 2}, 0, r"rank 0 \(dp 0, pp 0, tp 0\)"),
        ({"tp_size": 2}, 1, r"rank 1 \(dp 0, pp 0, tp 1\)"),
        ({"pp_size": 2}, 0, r"rank 0 \(dp 0, pp 0, tp 0\)"),
        ({"pp_size": 2}, 1, r"rank 1 \(dp 0, pp 1, tp 0\)"),
        ({"dp_size": 2}, 1, r"rank 1 \(dp 1, pp 0, tp 0\)"),
    ],
    ids=str,
)
def test_a_rank_that_dies_while_generating(sizes: dict[str, int], victim: int, place: str, tiny: Path) -> None:
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, **sizes))
    pids = pids_of(engine)
    killed_at = 0.0

    def kill() -> None:
        nonlocal killed_at
        killed_at = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)

    with after(0.5, kill), pytest.raises(RankFailure, match=f"^{place} failed: exit code -9 \\(SIGKILL\\)"):
        engine.generate([PROMPT] * 4, FOREVER, progress=False)
    assert time.monotonic() - killed_at < SOON_S
    assert alive(pids) == []
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([PROMPT], greedy(8), progress=False)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_idle(victim: int, tiny: Path) -> None:
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2))
    pids = pids_of(engine)
    os.kill(pids[victim], signal.SIGKILL)
    assert gone_within(SOON_S, [pids[victim]])
    started = time.monotonic()
    with pytest.raises(RankFailure, match=f"^rank {victim} .* failed: exit code -9 \\(SIGKILL\\)"):
        engine.generate([PROMPT], greedy(8), progress=False)
    assert time.monotonic() - started < SOON_S
    assert alive(pids) == []


@pytest.mark.slow
def test_a_rank_that_hangs(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collective's timeout ends the wait; the message names the group."""
    monkeypatch.setattr(
        own_ranks.RankProcesses.close, "__defaults__", (1.0,)
    )  # which the one that hangs is given to end
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2, collective_timeout_s=2))
    pids = pids_of(engine)
    with (
        after(0.5, lambda: os.kill(pids[1], signal.SIGSTOP)),
        pytest.raises(RankFailure, match=r"(?s)^rank 0 .*all_\w+.* failed on group 'tp' .*timeout 2 s"),
    ):
        engine.generate([PROMPT] * 4, FOREVER, progress=False)
    assert alive(pids) == []


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "victim"), [({"tp_size": 2}, 1), ({"pp_size": 2}, 0), ({"pp_size": 2}, 1)], ids=str)
def test_an_exception_in_a_step_on_one_rank(
    sizes: dict[str, int], victim: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON, **sizes))
    pids = pids_of(engine)
    executor = engine._world.executor
    assert isinstance(executor, MeshExecutor)

    def submit(replica: int, step: StepInput) -> None:
        wrong = replace(step, block_tables=())
        for rank, channel in enumerate(executor.channels):
            channel.send(wrong if rank == victim else step)

    monkeypatch.setattr(executor, "submit", submit)
    started = time.monotonic()
    with pytest.raises(RankFailure, match=rf"(?s)^rank {victim} \(dp .* failed: exit code 1; .*Traceback.*launch"):
        engine.generate([PROMPT], greedy(8), progress=False)
    assert time.monotonic() - started < SOON_S
    assert alive(pids) == []
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.stats()


def test_an_exception_in_a_step_in_this_process(tiny: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same failure as on other ranks; an impatient Ctrl-C, though, leaves the engine usable."""
    engine = InferenceEngine(tiny, InferenceConfig(**COMMON))
    worker = engine._world.executor.worker

    def fail(error: type[BaseException]) -> None:
        def launch(step: StepInput) -> None:
            monkeypatch.undo()
            raise error("here")

        monkeypatch.setattr(worker, "launch", launch)

    fail(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], greedy(8), progress=False)
    answers_rightly(engine, module)
    fail(MemoryError)
    with pytest.raises(RankFailure, match=r"^rank 0 failed: MemoryError: here$") as failure:
        engine.generate([PROMPT], greedy(8), progress=False)
    assert isinstance(failure.value.__cause__, MemoryError)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([PROMPT], greedy(8), progress=False)


# ---- a rank that does not start ----------------------------------------------------------------------------------


def shadow(module: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a module before the real one; the ranks, which begin with the driver's sys.path, import it."""
    (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    "broken", ["psutil", pytest.param("torch", marks=pytest.mark.slow)], ids=["with the worker", "before anything"]
)
def test_a_rank_that_fails_to_start(broken: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow(broken, f"raise OSError('{broken} is broken here')", tmp_path, monkeypatch)
    children = set(psutil.Process().children())
    started = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2))
    assert time.monotonic() - started < 20
    message = str(failure.value)
    assert re.match(r"rank [01] \(dp 0, pp 0, tp [01]\) failed: exit code 1; its last output:\n", message), message
    assert "Traceback" in message and message.endswith(f"OSError: {broken} is broken here")
    assert set(psutil.Process().children()) == children


@pytest.mark.slow
def test_a_rank_that_exits_at_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no Python today >&2\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RankFailure, match=r"(?s)^rank [01] .* failed: exit code 7; its last output:\nno Python today$"):
        InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2))


@pytest.mark.slow
def test_a_rank_that_never_comes(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow("psutil", "import time; time.sleep(600)", tmp_path, monkeypatch)
    children = set(psutil.Process().children())
    with pytest.raises(RankFailure, match=r"no answer from ranks \[0, 1\] within start_timeout_s=2"):
        InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2, start_timeout_s=2))
    assert set(psutil.Process().children()) == children


@pytest.mark.slow
def test_a_faulty_checkpoint_that_only_a_rank_can_see(tiny: Path, tmp_path: Path) -> None:
    """A file that shrinks after the driver looked at it is still the user's matter, and not a rank's failure."""
    import shutil

    from meshlm.shardformer import CheckpointError, shardformer

    copy = shutil.copytree(tiny, tmp_path / "copy")
    checkpoint = shardformer.open_checkpoint(copy)
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshlm.engine.engine.open_checkpoint", lambda *_, **__: checkpoint)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ended at byte"):
            InferenceEngine(copy, InferenceConfig(**COMMON, pp_size=2))


# ---- under torchrun ----------------------------------------------------------------------------------------------


def test_the_fit_of_another_hosts_ranks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts would share the ranks: on each, its own stages have to fit, not the first ones."""
    spec = open_checkpoint(tiny).spec
    config = InferenceConfig(**COMMON, pp_size=4)
    stages = split_layers(spec, 4)
    sizes = [stage_bytes(spec, Shards(spec, 1), stage, 0, itemsize=4) for stage in stages]
    assert sizes[0] > sizes[1]
    devices = [torch.device("cpu")]
    monkeypatch.setattr(plan, "available_bytes", lambda _: sizes[1])
    plan.check_fit(config, spec, devices, first_rank=1)
    with pytest.raises(ValueError, match="the model does not fit"):
        plan.check_fit(config, spec, devices, first_rank=0)


@pytest.mark.slow
def test_a_mesh_that_is_not_the_world(tmp_path: Path, tiny: Path, torchrun: Any) -> None:
    text = """
from pathlib import Path
try:
    start(tp_size=2, pp_size=2)
except ValueError as error:
    (Path(__file__).parent / os.environ["RANK"]).write_text(str(error))
"""
    with torchrun(2, write_script(tmp_path, tiny, text)) as agent:
        _, err = agent.communicate(timeout=90)
    assert agent.returncode == 0, err
    for rank in "01":
        assert (tmp_path / rank).read_text() == (
            "InferenceConfig: dp_size=1 × pp_size=2 × tp_size=2 make a mesh of 4 ranks, but torchrun started 2; "
            "use --nproc-per-node 4, or sizes whose product is 2"
        )


@pytest.mark.slow
def test_ranks_that_were_given_different_things(tmp_path: Path, tiny: Path, torchrun: Any) -> None:
    """Told on every rank in the same line, before anything is loaded; the ranks can then make an engine together."""
    make_module(seed=1).save_pretrained(tmp_path / "other")
    text = """
from pathlib import Path
first = os.environ["RANK"] == "0"

def error_of(model, **fields):
    try:
        InferenceEngine(model, InferenceConfig(**COMMON | fields))
    except ValueError as error:
        return str(error)

report = {
    "mesh": error_of(TINY, tp_size=2) if first else error_of(TINY, pp_size=2),
    "weights": error_of(TINY if first else OTHER, tp_size=2),
    "timeout": error_of(TINY, tp_size=2, collective_timeout_s=100 if first else 200),
}
with start(tp_size=2) as engine:
    report["token_ids"] = answer(engine)
(Path(__file__).parent / os.environ["RANK"]).write_text(json.dumps(report))
"""
    for name, value in (("COMMON", COMMON), ("TINY", str(tiny)), ("OTHER", str(tmp_path / "other"))):
        text = text.replace(name, repr(value))
    with torchrun(2, write_script(tmp_path, tiny, text)) as agent:
        _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    reports = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    assert reports[0] == reports[1]
    assert reports[0]["mesh"] == (
        "InferenceConfig.tp_size: rank 0 has 2, rank 1 has 1; InferenceConfig.pp_size: rank 0 has 1, rank 1 has 2; "
        "under torchrun every rank is to be given the same"
    )
    assert re.fullmatch(
        r"model: checksum of model\.layers\.0\.self_attn\.q_proj\.weight\[0\]: rank 0 has \d+, rank 1 has \d+; "
        r"under torchrun every rank is to be given the same",
        reports[0]["weights"],
    )
    assert reports[0]["timeout"] is None  # each rank's own


@pytest.mark.slow
def test_in_a_process_group_of_the_callers(tmp_path: Path, tiny: Path, module: Any, torchrun: Any) -> None:
    """A module as model; an interrupt on rank 0 is told to rank 1; close takes all groups but the caller's."""
    text = """
from pathlib import Path
import torch, transformers
import torch.distributed as dist

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")
groups = dist.distributed_c10d._world.pg_map
assert len(groups) == 1
report = {}

def interrupted(call):
    "\""Calls with a Ctrl-C in rank 0's third step."\""
    if rank == 0:
        core, countdown = engine._core, iter([1, 0])
        step = type(core).step
        def interrupt():
            if next(countdown, None) is None:
                del core.step
                raise KeyboardInterrupt
            return step(core)
        core.step = interrupt
    try:
        call()
    except (KeyboardInterrupt, InterruptedError) as error:
        return f"{type(error).__name__}: {error}"

module = transformers.LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
with InferenceEngine(module, InferenceConfig(**COMMON, tp_size=2)) as engine:
    report["module"] = answer(engine)
    assert len(groups) > 1
assert len(groups) == 1, groups

engine = start(pp_size=2)
report["path"] = answer(engine)
many = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}
report["generate"] = interrupted(lambda: engine.generate([[5, 6, 7]], many, progress=False))
report["stream"] = interrupted(lambda: list(engine.stream([[5, 6, 7]], many)))
for item in engine.stream([[5, 6, 7]], many):
    break
report["streamed"] = len(list(engine.stream([[5, 6, 7]], many)))
report["after"] = answer(engine)
if rank == 1:
    follower = engine._world._follower
    assert not follower._left and not follower._kept, (follower._left, follower._kept)
stream = engine.stream([[5, 6, 7]], many)
next(stream)
engine.close()
try:
    next(stream)
except RuntimeError as error:
    report["closed"] = str(error)
assert len(groups) == 1, groups
total = torch.ones(1)
dist.all_reduce(total)
report["total"] = total.item()
del total
dist.destroy_process_group()
threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
report["left"] = [name for name in threads if "gloo" in name]  # would be in the way of the interpreter's exit
(Path(__file__).parent / str(rank)).write_text(json.dumps(report))
""".replace("MODEL", repr(str(tiny))).replace("COMMON", repr(COMMON))
    with torchrun(2, write_script(tmp_path, tiny, text)) as agent:
        _, err = agent.communicate(timeout=120)
    assert agent.returncode == 0, err
    told = {0: "KeyboardInterrupt: ", 1: "InterruptedError: rank 0 was interrupted: KeyboardInterrupt"}
    expected = by_transformers(module, PROMPT, 8)
    for rank in (0, 1):
        assert json.loads((tmp_path / str(rank)).read_text()) == {
            "module": expected,
            "path": expected,
            "generate": told[rank],
            "stream": told[rank],
            "streamed": 30,
            "after": expected,
            "closed": "the engine is closed; make a new InferenceEngine",
            "total": 2.0,
            "left": [],
        }


@pytest.mark.parametrize("streams", [False, True], ids=["everywhere", "each_everywhere"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_an_interrupt_at_any_line_leaves_no_follower_waiting(streams: bool, fails: bool) -> None:
    """A Ctrl-C at each line of the calls' way through `World`: what has begun is told to its end, once."""
    files = {interrupts.__file__, world.__file__}
    interrupted_at = 0

    class Told(MeshExecutor):
        def __init__(self) -> None:
            self.messages: list[Published] = []

        def publish(self, message: Published) -> None:
            self.messages.append(message)

    for moment in itertools.count(1):
        driver, executor = World.__new__(World), Told()
        driver._call, driver._executor, driver._follower, driver._joined = 0, executor, None, True
        driver._finalizer = SimpleNamespace(alive=True)  # type: ignore[assignment]
        begun, countdown = False, moment

        def work() -> list[int]:
            nonlocal begun
            begun = True
            if fails:
                raise ValueError("no")
            return [1, 2]

        def on_line(frame: Any, event: str, _: object) -> Any:
            nonlocal countdown
            countdown -= event == "line" and frame.f_code.co_filename in files
            if countdown == 0 and event == "line":
                countdown = -1
                signal.raise_signal(signal.SIGINT)
            return on_line

        before, interrupted, value = sys.gettrace(), False, None
        sys.settrace(on_line)
        try:
            value = list(driver.each_everywhere(work)) if streams else driver.everywhere(work)
        except KeyboardInterrupt:
            interrupted = True
        except ValueError:
            assert fails
        finally:
            sys.settrace(before)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if countdown > 0:  # there are no more lines
            break
        assert interrupted
        interrupted_at += 1
        last = [message for message in executor.messages if message.is_last]
        if begun or (driver._call and not streams):
            assert len(last) == 1 and last[0] is executor.messages[-1], (moment, executor.messages)
            assert last[0].call == driver._call == 1
    assert value == (None if fails else [1, 2]) and interrupted_at > 20


@pytest.mark.slow
def test_ctrl_c_on_rank_0_while_it_tells_a_calls_result(tmp_path: Path, tiny: Path, module: Any, torchrun: Any) -> None:
    text = """
from pathlib import Path
rank = int(os.environ["RANK"])
engine = start(tp_size=2)
report = {"before": answer(engine)}

def interrupted(call):
    if rank == 0:
        executor = engine._world.executor
        def publish(message):
            if message.is_last:
                del executor.publish
                os.kill(os.getpid(), signal.SIGINT)
            type(executor).publish(executor, message)
        executor.publish = publish
    try:
        return len(call())
    except (KeyboardInterrupt, InterruptedError) as error:
        return type(error).__name__

many = {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True}
report["generate"] = interrupted(lambda: engine.generate([[5, 6, 7]], many, progress=False))
report["stream"] = interrupted(lambda: list(engine.stream([[5, 6, 7]], many)))
report["after"] = answer(engine)
engine.close()
(Path(__file__).parent / str(rank)).write_text(json.dumps(report))
"""
    with torchrun(2, write_script(tmp_path, tiny, text)) as agent:
        _, err = agent.communicate(timeout=60)
    assert agent.returncode == 0, err
    expected = by_transformers(module, PROMPT, 8)
    for rank, found in ((0, ["KeyboardInterrupt"] * 2), (1, [1, 4])):
        report = json.loads((tmp_path / str(rank)).read_text())
        assert report == {"before": expected, "generate": found[0], "stream": found[1], "after": expected}


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "pp_size"), [(0, 1), (3, 2)], ids=["the driver", "a follower"])
def test_a_rank_of_torchrun_that_is_killed(
    victim: int, pp_size: int, tmp_path: Path, tiny: Path, torchrun: Any
) -> None:
    text = f"""
engine = start(tp_size=2, pp_size={pp_size})
answer(engine)
if os.environ["RANK"] == "0":
    say(pids=pids_of(engine))
engine.generate([[5, 6, 7]] * 2, {FOREVER}, progress=False)
"""
    with torchrun(2 * pp_size, write_script(tmp_path, tiny, text)) as agent:
        pids = Running(agent).hear()["pids"]
        time.sleep(0.5)
        os.kill(pids[victim], signal.SIGKILL)
        assert gone_within(15, pids)
        agent.communicate(timeout=20)
        assert agent.returncode != 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_ranks_that_nobody_watches(victim: int, tmp_path: Path, tiny: Path) -> None:
    """Torchrun's variables without its agent, which would end the others: each finds out, and raises, by itself."""
    text = f"""
from pathlib import Path
rank = os.environ["RANK"]
engine = start(tp_size=2, pp_size=2)
answer(engine)
say(ready=True)
try:
    engine.generate([[5, 6, 7]] * 2, {FOREVER}, progress=False)
except Exception as error:
    say(kind=type(error).__name__, error=str(error))
try:
    engine.stats()
except Exception as error:
    say(kind=type(error).__name__, error=str(error))
"""
    script_file = write_script(tmp_path, tiny, text)
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                running(sys.executable, str(script_file), **common, RANK=rank, LOCAL_RANK=rank, OMP_NUM_THREADS="1")
            )
            for rank in "0123"
        ]
        for rank in ranks:
            assert rank.hear() == {"ready": True}
        time.sleep(0.5)
        ranks[victim].process.kill()
        killed_at = time.monotonic()
        others = [rank for index, rank in enumerate(ranks) if index != victim]
        for rank in others:
            report = rank.hear()
            assert report["kind"] == "RankFailure", report
            expected = "rank 0, which drives," if victim == 0 else f"rank {victim} (dp 0"
            assert report["error"].startswith(expected), report
        assert time.monotonic() - killed_at < 2 * SOON_S
        for rank in others:
            report = rank.hear()
            assert report["kind"] == ("RankFailure" if victim == 0 else "RuntimeError"), report
            rank.process.wait(2 * SOON_S)


# ---- other models ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_size": 2}], ids=str)
def test_a_transformers_module(sizes: dict[str, int], module: Any) -> None:
    """Its weights go to the ranks through a file without a name, which is gone once they are loaded."""
    with InferenceEngine(module, InferenceConfig(**COMMON, **sizes)) as engine:
        prompts = [PROMPT, list(range(2, 60)), [77]]
        outputs = engine.generate(prompts, greedy(20), progress=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert list(output.token_ids) == by_transformers(module, prompt, 20)
        if sizes:
            assert shared_memory_of([os.getpid(), *pids_of(engine)]) == []


@pytest.mark.slow  # the real model, twice
def test_a_gguf_file(demo_model: Path, demo_gguf: Path) -> None:
    """The same ids as the directory that was converted from it; ids, because the two tokenizers differ."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(49152, (n,), generator=generator).tolist() for n in (1, 17, 40)]
    params = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    token_ids = []
    for model in (demo_model, demo_gguf):
        with InferenceEngine(model, InferenceConfig(**{**COMMON, "num_kv_blocks": 64})) as engine:
            token_ids.append([output.token_ids for output in engine.generate(prompts, params, progress=False)])
    assert token_ids[0] == token_ids[1]


@pytest.mark.slow
def test_two_engines_at_once(tiny: Path, module: Any) -> None:
    other = make_module(seed=1)
    engines = {
        "ranks": InferenceEngine(tiny, InferenceConfig(**COMMON, tp_size=2)),
        "local": InferenceEngine(other, InferenceConfig(**COMMON)),
        "more ranks": InferenceEngine(other, InferenceConfig(**COMMON, pp_size=2)),
    }
    prompts = [PROMPT, list(range(2, 60)), [77]]
    found: dict[str, dict[str, list[int]]] = {name: {} for name in engines}
    for index, prompt in enumerate(prompts):
        for engine in engines.values():
            engine.add_request(prompt, greedy(20), request_id=str(index))
            engine.step()
    while any(engine.has_unfinished() for engine in engines.values()):
        for name, engine in engines.items():
            found[name] |= {o.request_id: list(o.token_ids) for o in engine.step() if o.finished}
    for name, engine in engines.items():
        right = module if name == "ranks" else other
        assert found[name] == {str(i): by_transformers(right, prompt, 20) for i, prompt in enumerate(prompts)}
        engine.check()
    engines["ranks"].close()
    answers_rightly(engines["local"], other)
    answers_rightly(engines["more ranks"], other)
    engines["local"].close()
    engines["more ranks"].close()


# ---- replicas ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_requests_go_to_the_replica_with_the_least_work(tiny: Path, module: Any) -> None:
    with InferenceEngine(tiny, InferenceConfig(**COMMON, dp_size=2)) as engine:
        ids = [engine.add_request([10 + i] * 20, greedy(4)) for i in range(8)]
        assert [replica.num_waiting for replica in engine.stats().replicas] == [4, 4]
        outputs = {}
        while engine.has_unfinished():
            outputs |= {output.request_id: list(output.token_ids) for output in engine.step() if output.finished}
        assert [outputs[i] for i in ids] == [by_transformers(module, [10 + i] * 20, 4) for i in range(8)]

        # One long prompt weighs as much as several short ones.
        for prompt in ([100] * 80, [101] * 20, [102] * 20, [103] * 20):
            engine.add_request(prompt, greedy(4))
        assert sorted(replica.num_waiting for replica in engine.stats().replicas) == [1, 3]
        while engine.has_unfinished():
            engine.step()
        engine.check()


@pytest.mark.slow
def test_a_long_prefix_draws_requests_to_its_replica(tiny: Path) -> None:
    with InferenceEngine(tiny, InferenceConfig(**COMMON, dp_size=2)) as engine:
        prefix = [(7 * i) % 250 + 2 for i in range(160)]
        engine.generate([prefix], greedy(4), progress=False)
        home = max(range(2), key=lambda i: engine.stats().replicas[i].num_prompt_tokens)
        for i in range(4):  # one after the other: the replica is idle again
            before = engine.stats().replicas[home].num_prompt_tokens
            (output,) = engine.generate([[*prefix, 10 + i, 20]], greedy(4), progress=False)
            assert output.num_cached_tokens == 160
            assert engine.stats().replicas[home].num_prompt_tokens == before + 162

        # A prefix match does not outweigh a replica that has much more to do.
        engine.add_request([5] * 1000, greedy(4))
        loaded = [replica.num_waiting for replica in engine.stats().replicas].index(1)
        engine.add_request([6] * 100, greedy(4))
        assert [replica.num_waiting for replica in engine.stats().replicas] == [1, 1]
        if loaded == home:
            engine.add_request([*prefix, 33], greedy(4))
            assert engine.stats().replicas[home].num_waiting == 1
        while engine.has_unfinished():
            engine.step()
        engine.check()
