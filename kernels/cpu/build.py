"""This folder's C++ as one shared library.

No header of torch's is needed: the functions take addresses and sizes, and are called through ctypes. They run on the
threads of the OpenMP runtime that torch has loaded; with one of their own, two pools would wait for each other's cores.
"""

import ctypes
import platform
import warnings
from functools import cache
from pathlib import Path

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-w")
_FOLDER = Path(__file__).parent
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


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
    from ...config.native import CompileError, compiled  # not sooner: see the test of `import kernels`

    try:
        runtime = _openmp_runtime()
        sources, headers = sorted(_FOLDER.glob("*.cpp")), sorted(_FOLDER.glob("*.h"))
        file = compiled("cpu", "the CPU ops (once, about ten seconds)", sources, _FLAGS, headers)
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # loaded already: its names become known to what follows
        _keep_freed_memory()
        return ctypes.CDLL(str(file))
    except Unavailable as reason:
        return reason
    except (CompileError, OSError) as error:
        warnings.warn(f"no C++ ops, plain torch does their work, slower: {error}", stacklevel=2)
        return Unavailable(f"{error}")


def _keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one: outputs of megabytes would else go back to the system, and
    cost a page fault for every 4 KiB when they are written anew, a tenth of a long prefill's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most there is
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


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
