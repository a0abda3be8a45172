"""A part of a run: the process of an engine with a model, which has the device's memory to itself."""

import json
import signal
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import reason

from .engines import ENGINES, MeshLM
from .tasks import Result, Task, say
from .trace import profile
from .workloads import MEASUREMENTS


def run_part(tasks: Sequence[Task], results: Path) -> None:
    """Works in a process of its own; each result goes to the end of a file as soon as it is there."""

    def write(kind: str, value: Any) -> None:
        with results.open("a") as file:
            file.write(json.dumps({"kind": kind, "value": value}) + "\n")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # `interrupted_after` needs it, whatever the shell did
    for task in tasks:
        if task.device != "cpu":
            torch.cuda.set_device(torch.device(task.device))
        for name in task.engines:
            label = f"{task.shape.label}, {name}"
            say(f"{label}: loading, {task.left():.0f} s left")
            engine = None
            try:
                engine = (MeshLM if name == "profile" else ENGINES[name])(task)
                if name == "profile":
                    assert isinstance(engine, MeshLM)
                    write("profile", profile(task, engine))
                    continue
                for workload in engine.workloads:
                    if task.left() < 0:
                        raise TimeoutError(f"no time was left for {workload}")
                    try:
                        engine.prepare(workload)
                        for result in MEASUREMENTS[workload](task, engine, partial(Result, task.model, name)):
                            write("result", asdict(result))
                            rate = result.failure or f"{result.tokens_per_s:.5g} tokens/s"
                            cut = ", cut" if result.cut else ""
                            say(f"{label}: {result.workload}: {rate}{cut}; {task.left():.0f} s left")
                    except TimeoutError:
                        raise
                    except Exception as error:  # one that fails to compile, say, must not take the next with it
                        traceback.print_exc()
                        write("note", f"{label}, {workload}: FAILED: {reason(error)}")
                        torch._dynamo.reset()
            except Exception as error:  # a part that fails must not take the others' figures with it
                if not isinstance(error, TimeoutError):
                    traceback.print_exc()
                write("note", f"{label}: FAILED: {reason(error)}")
            finally:
                if engine is not None:
                    for note in engine.notes:
                        write("note", f"{label}: {note}")
                    with suppress(Exception):
                        engine.close()
