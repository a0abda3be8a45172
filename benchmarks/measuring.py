"""What the benchmarks for GPUs share: the clock, the device's own rates, tables, and where results go."""

import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[1] / "docs" / "results"
_PACKAGES = ("torch", "triton", "transformers", "flash-attn")

Call = Callable[[], Any]


class Clock:
    """Median seconds of a call.

    A round makes several calls, each on data of its own, one behind the other, and keeps what they return: together
    they touch more than the caches hold, so that each reads its input from memory and writes its output there, as the
    layers of a model do. On a GPU the device is first kept busy until the host has queued the round: the host's time
    counts only where a call waits for the device.
    """

    def __init__(self, device: torch.device, most_rounds: int = 30) -> None:
        self.device, self.most_rounds = device, most_rounds

    @property
    def cache_bytes(self) -> int:
        """What the data of a round's calls should exceed together."""
        if self.device.type != "cuda":
            return 0  # the CPU's runs show that a script works
        return 4 * int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def num_sets(self, num_bytes: float) -> int:
        """How many calls that touch so many bytes each make a round."""
        return max(1, -(-self.cache_bytes // max(1, int(num_bytes))))

    def seconds(self, *calls: Call) -> float:
        """Of one call, on average over a round, and the median of the rounds."""
        if self.device.type != "cuda":
            return self._seconds_on_cpu(calls)
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        kept = [call() for call in calls]
        host_s = time.perf_counter() - started
        torch.cuda.synchronize()
        whole_s = time.perf_counter() - started
        del kept
        rounds = max(5, min(self.most_rounds, int(0.3 / whole_s)))
        head_start = int(1.5 * host_s * self._cycles_per_s)
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(head_start)
            start.record()
            kept = [call() for call in calls]
            end.record()
            end.synchronize()
            del kept
            times.append(start.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(times)

    def _seconds_on_cpu(self, calls: Sequence[Call]) -> float:
        times = []
        for index in range(3):
            started = time.perf_counter()
            kept = [call() for call in calls]
            if index:  # the first warms up
                times.append((time.perf_counter() - started) / len(calls))
            del kept
        return statistics.median(times)

    @cached_property
    def _cycles_per_s(self) -> float:
        """Of the clock that `_sleep` counts."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
        return 10_000_000 / (start.elapsed_time(end) / 1e3)


def copy_bandwidth(clock: Clock, toy: bool) -> float:
    """Bytes a second, read and written counted both, of copying a large tensor on the device."""
    source = torch.ones(2**20 if toy else 2**30, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.seconds(lambda: target.copy_(source))


def matmul_rate(clock: Clock, dtype: torch.dtype, toy: bool) -> float:
    """FLOP a second of a large square matrix product."""
    n = 256 if toy else 8192
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / clock.seconds(lambda: torch.mm(a, b, out=out))


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).normal_()


def reason(error: BaseException, length: int = 160) -> str:
    """An error in one line that fits beside a table."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


# ---- results --------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def where_and_when(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def _commit() -> str | None:
    """The checkout's, if it is one; "+" after it where files differ from it."""
    command = ["git", "-C", str(RESULTS.parents[1]), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def heading(where: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return [f"{where['date']}, {where['device']}; {versions}; commit {where['commit']}", where["command"]]


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lines; the first `num_left` columns and the last stand to the left, the others, numbers, to the right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < num_left or i == len(row) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [line(row) for row in cells]


def result_stem(script: str, where: Mapping[str, Any]) -> str:
    """Such as gpu-2026-11-20t2355-nvidia-h200-torch-2.13.0-triton-3.6.0."""
    versions = [f"{name}-{where['versions'][name]}" for name in ("torch", "triton") if name in where["versions"]]
    name = "-".join([script, where["date"][:16].replace(":", ""), where["device"], *versions])
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def write_results(folder: Path, stem: str, result: Mapping[str, Any], table: Sequence[str]) -> Path:
    """The table as text, and beside it everything as JSON, whose path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.txt").write_text("\n".join(table) + "\n")
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
