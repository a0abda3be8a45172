"""Compiles this folder's C++ into one shared library, once for each machine and version of the sources, and loads it.

No header of torch's is needed: the functions take addresses and sizes, and are called through ctypes. They run on the
threads of the OpenMP runtime that torch has loaded; with one of their own, two pools would wait for each other's cores.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")


class Unavailable(Exception):
    """The library cannot be had here; says why in one line."""


@cache
def load_library() -> ctypes.CDLL:
    """The compiled ops. Raises Unavailable; what is raised once is not tried again in this process."""
    result = _try_load()
    if isinstance(result, Unavailable):
        raise result
    return result


@cache
def _try_load() -> ctypes.CDLL | Unavailable:
    try:
        runtime = _openmp_runtime()
        file = _library_file()
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.parent):
                if not file.exists():
                    _compile(file)
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # loaded already: its names become known to what follows
        return ctypes.CDLL(str(file))
    except Unavailable as reason:
        return reason
    except OSError as error:
        return Unavailable(f"{error}")


def _openmp_runtime() -> Path:
    """The OpenMP library in this process, which is torch's."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        raise Unavailable(f"C++ ops are not built on {platform.system()}") from None
    for line in mapped:
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise Unavailable("torch has loaded no OpenMP runtime")


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _library_file() -> Path:
    """Where the library is kept: a name for these sources, flags and this processor."""
    from ...config.cache import cache_folder  # not sooner: see the test of `import kernels`

    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in [*_sources(), Path(__file__).with_name("vector.h")]:
        digest.update(source.read_bytes())
    with open("/proc/cpuinfo") as cpuinfo:
        digest.update(next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "").encode())
    return cache_folder() / "kernels" / f"cpu-{digest.hexdigest()[:16]}.so"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: of several ranks one compiles."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(file: Path) -> None:
    """In a folder of its own, so that `file` is whole from the moment it exists."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable("no C++ compiler is installed (g++ or clang++; the variable CXX names another)")
    print(f"meshlm: compiling the CPU ops into {file.parent} (once, about ten seconds)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in _sources()]
        jobs = [
            subprocess.Popen([compiler, *_FLAGS, "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE, text=True)
            for source, made in zip(_sources(), objects, strict=True)
        ]
        said = [job.communicate()[1] for job in jobs]
        # Linked without -fopenmp, so that the runtime which is loaded already is the one that is found.
        linked = Path(folder) / file.name
        link = [compiler, "-shared", "-o", str(linked), *map(str, objects)]
        if not any(job.returncode for job in jobs):
            jobs.append(subprocess.Popen(link, stderr=subprocess.PIPE, text=True))
            said.append(jobs[-1].communicate()[1])
        for job, text in zip(jobs, said, strict=True):
            if job.returncode:
                last = text.strip().splitlines() or [f"exit code {job.returncode}"]
                raise Unavailable(f"{compiler} failed: {last[-1]}")
        os.replace(linked, file)
