"""Processes that tests of the engine start."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

Torchrun = Callable[..., contextlib.AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """torchrun(num_ranks, script, *arguments): its agent's process, under way; ended with all ranks at last."""

    @contextlib.contextmanager
    def start(num_ranks: int, script: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        agent = subprocess.Popen(
            [*command, str(script), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield agent
        finally:
            if agent.poll() is None:  # a test that failed or ran out of time
                for process in psutil.Process(agent.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            agent.kill()
            agent.communicate()

    return start
