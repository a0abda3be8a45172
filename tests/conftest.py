"""Shared by all tests: a clean environment and the demo model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# As torch loads, its threads learn how to wait for each other: asleep, so that they take no time from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from meshlm.serving.demo_model import demo_gguf_path, demo_model_path

# Before anything imports triton, which transformers' models do, and other conftest.py: without a GPU its kernels are
# interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class _RootIsNoTestPackage:
    """The repository's root has an __init__.py (it is the package meshlm); to pytest it is a folder like any other.

    Otherwise pytest would import that file a second time, under the name of the checkout's folder.
    """

    @pytest.hookimpl
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if path == parent.config.rootpath:
            directory: pytest.Dir = pytest.Dir.from_parent(parent, path=path)
            return directory
        return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTestPackage())
    # All this also for the processes that tests start. Nobody's own settings, and no model hub.
    for name in [name for name in os.environ if name.startswith("MESHLM_") and name != "MESHLM_CACHE"]:
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A shell without job control starts what runs in the background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads that wake interrupt no others: a gloo collective takes turns among three threads of each rank, of which
    # one spins while another holds its lock; with more ranks than cores it is four times as fast this way.
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's directory: SmolLM2-135M-Instruct, float32 safetensors (fetched by the first run)."""
    return demo_model_path()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small, or tests of so many threads, that more of torch's own only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The GGUF file that `demo_model` was converted from."""
    return demo_gguf_path()
