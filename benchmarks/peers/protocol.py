"""How the benchmark talks to a runner, an engine in a process and perhaps an environment of its own.

The runner's script gets the model, the dtype, the number of threads and words of its own as arguments. Then each side
writes lines of JSON, the runner to what was its stdout:

    runner     {"ready": {package: version, …}}, once the model is loaded, or {"error": "one line"}
    benchmark  {"prompts": [[id, …], …], "num_new": [n, …]}
    runner     {"seconds": s}: all requests at once, until the last has all its tokens; or {"error": "one line"}

A runner ends at the end of its stdin, so that it does not outlive the benchmark, however that ends. Runners import this
file: it needs nothing but the standard library.
"""

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

GRACE_S = 5  # for a runner to tidy up


class Runner:
    def run(self, prompts: list[list[int]], num_new: list[int]) -> Sequence[Sequence[int]]:
        """The new tokens of each prompt, greedy, exactly as many as asked for, whatever they are."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what would keep the process from ending."""


def answer(load: Callable[..., Runner], *packages: str) -> None:
    """The runner's side, until stdin ends: `load(model, dtype, threads, *words)` makes it, of these packages."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=out, flush=True)

    try:
        model, dtype, threads, *words = sys.argv[1:]
        runner = load(model, dtype, int(threads), *words)
        say({"ready": {package: importlib.metadata.version(package) for package in packages}})
        for line in sys.stdin:
            work = json.loads(line)
            started = time.perf_counter()
            tokens = runner.run(work["prompts"], work["num_new"])
            seconds = time.perf_counter() - started
            lengths = [len(new) for new in tokens]
            if lengths != work["num_new"]:
                raise ValueError(f"drew {lengths} tokens where {work['num_new']} were asked for")
            say({"seconds": seconds})
        runner.close()
    except Exception as error:
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise


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
            start_new_session=True,  # its processes end as one, and Ctrl-C is the benchmark's to handle
        )
        self.versions: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        self.versions = self._read()["ready"]

    def seconds(self, prompts: list[list[int]], num_new: list[int]) -> float:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps({"prompts": prompts, "num_new": num_new}), file=self.process.stdin, flush=True)
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"error": self._last_words()}
        if "error" in said:
            raise RunnerError(said["error"])
        return said

    def _last_words(self) -> str:
        self.log.seek(0)
        return next((line.strip() for line in reversed(self.log.readlines()) if line.strip()), "ended without a word")

    def close(self) -> None:
        """Ends the runner and all that it started. Can be called twice."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.log.close()
