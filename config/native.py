"""C++ that is compiled on first use: once for each machine, compiler flags and version of the sources."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .cache import cache_folder


class CompileError(Exception):
    """No compiler, or one that failed; says so in one line."""


def compiled(
    name: str, about: str, sources: Sequence[Path], flags: Sequence[str], headers: Sequence[Path] = ()
) -> Path:
    """A shared library of these sources, in `cache_folder()/kernels`.

    name: what its file's name begins with. about: what is being compiled, for a user who waits for it.
    Raises CompileError or OSError.
    """
    file = cache_folder() / "kernels" / f"{name}-{_digest(sources, flags, headers)}.so"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent):
            if not file.exists():
                print(f"meshlm: compiling {about} into {file.parent}", file=sys.stderr, flush=True)
                _compile(file, sources, flags)
    return file


def _digest(sources: Sequence[Path], flags: Sequence[str], headers: Sequence[Path]) -> str:
    """Of what a library depends on; this processor is a part of it."""
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in (*sources, *headers):
        digest.update(source.read_bytes())
    with open("/proc/cpuinfo") as cpuinfo:
        digest.update(next((line for line in cpuinfo if line.startswith(("flags", "Features"))), "").encode())
    return digest.hexdigest()[:16]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: of several ranks one compiles."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _compile(file: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    """In a folder of its own, so that `file` is whole from the moment it exists."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CompileError("no C++ compiler is installed (g++ or clang++; the variable CXX names another)")
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(made)], stderr=subprocess.PIPE, text=True)
            for source, made in zip(sources, objects, strict=True)
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
                raise CompileError(f"{compiler} failed: {last[-1]}")
        os.replace(linked, file)
