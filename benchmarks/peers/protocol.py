"""How the benchmark talks to a runner, an engine in a process and perhaps an environment of its own.

The runner's script gets the model, the dtype, the number of threads and words of its own as arguments. Then each side
writes lines of JSON, the runner to what was its stdout:

    runner     {"ready": {package: version, …}}, once the model is loaded, or {"error": "one line"}
    benchmark  {"prompts": [[id, …], …], "num_new": [n, …]}
    runner     {"seconds": s}: all requests at once, until the last has all its tokens; or {"error": "one line"}

A runner leads a process group. It ends, with all that it started, at the end of its stdin; once all are ready, and
between its turns, the group is stopped, so that nothing of it spins while another is timed. A group that is stopped
when the benchmark is killed gets SIGHUP from the kernel, since it is of the benchmark's session: so no runner outlives
the benchmark, however that ends. Runners import this file: it needs nothing but the standard library.
"""

import contextlib
import importlib.metadata
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

GRACE_S = 5.0  # for a runner to tidy up
READY_S = 1200.0  # vLLM compiles for minutes at its first start
ANSWER_S = 600.0


class Runner(ABC):
    @abstractmethod
    def run(self, prompts: list[list[int]], num_new: list[int]) -> Sequence[Sequence[int]]:
        """The new tokens of each prompt, greedy, exactly as many as asked for, whatever they are."""

    def close(self) -> None:  # noqa: B027 (most leave nothing)
        """Ends what would be left behind if the process were killed."""


def answer(load: Callable[..., Runner], *packages: str) -> None:
    """The runner's side, until stdin ends: `load(model, dtype, threads, *words)` makes it, of these packages."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    requests = _requests()
    try:
        model, dtype, threads, *words = sys.argv[1:]
        runner = load(model, dtype, int(threads), *words)
        say({"ready": {package: importlib.metadata.version(package) for package in packages}})
        for work in requests:
            started = time.perf_counter()
            tokens = runner.run(work["prompts"], work["num_new"])
            seconds = time.perf_counter() - started
            lengths = [len(new) for new in tokens]
            if lengths != work["num_new"]:
                raise ValueError(f"drew {lengths} tokens where {work['num_new']} were asked for")
            say({"seconds": seconds})
        runner.close()
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(BrokenPipeError):
            say({"error": " ".join(f"{type(error).__name__}: {error}".split())})
    finally:
        _end_group()


def _requests() -> Iterator[dict[str, Any]]:
    """Of the benchmark. When it is gone, a runner that is busy, or does not close, is ended."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with os.fdopen(os.dup(0)) as stdin:  # sys.stdin's lock would be taken in a process forked meanwhile
            for line in stdin:
                lines.put(line)
        lines.put(None)
        time.sleep(GRACE_S)
        _end_group()

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(line) for line in iter(lines.get, None))


def _end_group() -> None:
    if os.getpgrp() == os.getpid():  # else it was started by hand
        os.killpg(0, signal.SIGKILL)


class RunnerError(RuntimeError):
    """A runner that could not start, or ended; one line."""


class Child:
    """The benchmark's side: a runner's script under `python`, and every process it starts, until `close`."""

    def __init__(self, python: str | Path, script: Path, *words: str, environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the runner)
        self.process = subprocess.Popen(
            [python, script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
            process_group=0,  # its processes stop and end as one, and Ctrl-C is the benchmark's to handle
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        self.versions = self._read(READY_S)["ready"]

    def stop(self) -> None:
        """Until it is asked for something."""
        self._signal(signal.SIGSTOP)

    def seconds(self, prompts: list[list[int]], num_new: list[int]) -> float:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps({"prompts": prompts, "num_new": num_new}), file=self.process.stdin, flush=True)
        seconds = float(self._read(ANSWER_S)["seconds"])
        self.stop()
        return seconds

    def _read(self, within_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], within_s)[0]:  # never more than one answer to read
            raise RunnerError(f"no answer in {within_s:g} s; its last words: {self._last_words()}")
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            raise RunnerError(said["error"])
        return said

    def _last_words(self) -> str:
        self.log.seek(0)
        return next((line.strip() for line in reversed(self.log.readlines()) if line.strip()), "none")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Ends the runner and all that it started. Can be called twice."""
        if self.log.closed:
            return
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self._signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait(2 * GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            self.log.close()
