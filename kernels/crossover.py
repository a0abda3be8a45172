"""Up to how many rows our own products (`cpu/linear.cpp`, `cpu/compact_linear.cpp`) are faster than oneDNN's here:
measured once, then read.

What is found is kept in ``linear/….json`` in the cache (`config/cache.py`), one file for each processor, dtype,
number of threads, versions and settings of how threads wait. Remove the file to measure again.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
_SIZE_OUT, _SIZES_IN = 1024, (512, 1024, 2048, 4096)  # of the weights that are tried
_BYTES = 32 << 20  # of all weights of a round: more than the caches hold
_RUNS, _MANY_ROWS_RUNS, _MANY_ROWS = 7, 3, 256
_LOOKS = 3  # at where ours first seem slower: other work on the machine, which lasts, must not decide for ever
_SOURCES = "linear.cpp", "compact_linear.cpp", "compact.cpp", "compact.h", "product.h", "vector.h"
# Whether threads must be woken for each product, and what oneDNN may use.
_SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "ONEDNN_MAX_CPU_ISA"
_NOISE = 1.1  # slower by less is as fast: other work on the machine makes as much, and our own op can be on a tape

Product = Callable[[Tensor, Any], Tensor]
"""x [rows, in] and one of the weights that `prepare` made."""


def streamed_rows(kind: str, like: Tensor, prepare: Callable[[Tensor], Any], ours: Product, theirs: Product) -> int:
    """The most rows for which `ours` is to be called; 0 if never.

    kind: of weight, for the file's name; like: a weight [out, in]; one of nearly its size along `in` is tried; prepare:
    makes of a plain weight what both products take.
    """
    dtype, size_in = like.dtype, min(_SIZES_IN, key=lambda size: abs(math.log2(size / like.shape[1])))
    return _read_or_measure(kind, dtype, size_in, lambda: _measure(dtype, size_in, prepare, ours, theirs))


def _measure(
    dtype: torch.dtype, size_in: int, prepare: Callable[[Tensor], Any], ours: Product, theirs: Product
) -> dict[str, list[float]]:
    """Milliseconds of a round by the number of rows, (ours, theirs): the least of some runs, in turns."""
    plain = torch.randn(_SIZE_OUT, size_in).to(dtype)
    weights = [prepare(plain.clone()) for _ in range(1 + _BYTES // plain.nbytes)]
    found: dict[str, list[float]] = {}
    for rows in ROWS:
        x = torch.randn(rows, size_in).to(dtype)
        least = [math.inf, math.inf]
        for _ in range(1 if any(_slower(*times) for times in found.values()) else _LOOKS):
            for _ in range(_RUNS if rows < _MANY_ROWS else _MANY_ROWS_RUNS):
                for i, product in enumerate((ours, theirs)):
                    started = time.perf_counter()
                    for weight in weights:
                        product(x, weight)
                    least[i] = min(least[i], 1e3 * (time.perf_counter() - started))
            if not _slower(*least):
                break
        found[str(rows)] = least
        if least[0] > 1.5 * least[1]:
            break  # it will not be faster with more
    return found


def _slower(ours: float, theirs: float) -> bool:
    return ours > _NOISE * theirs


def last_faster(times: dict[str, list[float]]) -> int:
    """The most rows up to which ours are as fast as theirs."""
    most = 0
    for rows, (ours, theirs) in times.items():
        if _slower(ours, theirs):
            break
        most = int(rows)
    return most


_found: dict[tuple[Any, ...], int] = {}


def _read_or_measure(kind: str, dtype: torch.dtype, size_in: int, measure: Callable[[], dict[str, list[float]]]) -> int:
    from ..config.cache import cache_folder  # not sooner: see the test of `import kernels`
    from ..config.native import locked

    name, folder, threads = str(dtype).removeprefix("torch."), cache_folder() / "linear", torch.get_num_threads()
    key = folder, kind, name, size_in, threads
    if key in _found:
        return _found[key]
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    about = {"processor": _processor(), "torch": torch.__version__, "ours": _version_of_ours(), "settings": settings}
    digest = hashlib.sha256(json.dumps([about, threads]).encode()).hexdigest()[:12]
    file = folder / f"{kind}-{name}-{size_in}-{threads}-threads-{digest}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):  # of several ranks one measures
            times = _read(file)
            if times is None:
                times = measure()
                _write(file, {**about, "threads": threads, "ms by rows (ours, oneDNN)": times})
    except OSError:  # nowhere to keep it
        times = measure()
    return _found.setdefault(key, last_faster(times))


def _read(file: Path) -> dict[str, list[float]] | None:
    try:
        times = json.loads(file.read_text())["ms by rows (ours, oneDNN)"]
        last_faster(times)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours
        return None
    return dict(times)


def _write(file: Path, content: dict[str, Any]) -> None:
    """Whole from the moment it exists."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(content, temporary, indent=2)
    os.replace(temporary.name, file)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256(" ".join([platform.machine(), *kinds[:2]]).encode()).hexdigest()[:16]


@cache
def _version_of_ours() -> str:
    folder = Path(__file__).parent / "cpu"
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _SOURCES)).hexdigest()[:16]
