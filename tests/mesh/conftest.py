"""Tests marked `on_four_ranks` run on four gloo ranks, started once for all of them.

Each rank runs the functions that pytest selected, each in a process group of its own, and reports the ones that failed.
A test then fails with the tracebacks of its ranks. Assertions on the ranks are plain Python's: pytest rewrites none.
"""

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

NUM_RANKS = 4
MARK = "on_four_ranks"
TIMEOUT_S = 240

Report = dict[str, str]  # of one rank: a failed test's id -> traceback


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: runs on each of four gloo ranks; slow, because they must be started")


def pytest_itemcollected(item: pytest.Item) -> None:
    if isinstance(item, pytest.Function) and item.get_closest_marker(MARK):
        item.add_marker(pytest.mark.slow)
        item.fixturenames.append("reports")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker(MARK) is None:
        return None
    reports: list[Report] = pyfuncitem.funcargs["reports"]
    name = _name(pyfuncitem)
    failed = [f"rank {rank}:\n{report[name]}" for rank, report in enumerate(reports) if name in report]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    return True


def _name(item: pytest.Function) -> str:
    return f"{item.path}::{item.name}"


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """For each rank, the tracebacks of the selected tests that failed there."""
    folder = tmp_path_factory.mktemp("ranks")
    selected = [i for i in request.session.items if isinstance(i, pytest.Function) and i.get_closest_marker(MARK)]
    (folder / "selected").write_text(json.dumps([_name(item) for item in selected]))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(rank), str(store.port), str(folder)] for rank in range(NUM_RANKS)]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        assert [rank.wait(TIMEOUT_S) for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(NUM_RANKS)]


# ---- on a rank ---------------------------------------------------------------------------------------------------


def run_tests(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    report: Report = {}
    for name in json.loads((folder / "selected").read_text()):
        # A process group for each, so that one that fails leaves nothing behind for the next.
        dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=NUM_RANKS)
        _meet(store, f"begin {name}", rank)
        try:
            _function(name)()
        except BaseException:
            report[name] = traceback.format_exc()
        _meet(store, f"end {name}", rank)
        if dist.is_initialized():
            dist.destroy_process_group()
    (folder / f"rank{rank}").write_text(json.dumps(report))


def _meet(store: dist.Store, place: str, rank: int) -> None:
    """Waits for all ranks: a group that is destroyed while another rank still connects to it fails there."""
    store.set(f"{place} {rank}", "")
    store.wait([f"{place} {each}" for each in range(NUM_RANKS)])


def _function(name: str) -> Callable[[], None]:
    path, function = name.split("::")
    module = sys.modules.get(path)
    if module is None:
        spec = importlib.util.spec_from_file_location(path, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    loaded: Callable[[], None] = getattr(module, function)
    return loaded


if __name__ == "__main__":
    run_tests(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
