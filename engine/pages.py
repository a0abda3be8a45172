"""Memory of a KV cache on a CPU: pages that the system gives when they are first touched, and some of them before.

A cache takes memory as it is used. But the first touch of a page can take long: on a virtual machine, whose host may
have to find it first, a twentieth of the time of the prompt that is stored there. So the blocks that come into use
first are touched beforehand, while no step runs.
"""

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

HUGE_PAGE = 2 << 20  # bytes
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
_IDLE_S = 0.05  # without a step, before the next page is touched
_PAUSE_S = 0.05  # between two looks


def zeros(num_bytes: int) -> mmap.mmap | np.ndarray:
    """A buffer of zeros, in huge pages where it is as long as one and the system has them."""
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(num_bytes, dtype=np.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class PagesAhead:
    """Touches the beginning of each region, all a page further in turns, until `end`.

    regions: addresses and bytes, which must stay while this does; idle_s: seconds since the last step ended, 0 while
    one runs.
    """

    def __init__(self, regions: Sequence[tuple[int, int]], idle_s: Callable[[], float]) -> None:
        self._regions, self._idle_s = regions, idle_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meshlm-pages", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        madvise = ctypes.CDLL(None).madvise  # mmap's own would hold up all threads of Python
        for address, size in self._parts():
            while not self._ended.is_set() and self._idle_s() < _IDLE_S:
                self._ended.wait(_PAUSE_S)
            if self._ended.is_set() or madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE):
                return  # a system that cannot, or has no memory: then it comes as it is touched

    def _parts(self) -> Iterator[tuple[int, int]]:
        for start in range(0, max((size for _, size in self._regions), default=0), HUGE_PAGE):
            for address, size in self._regions:
                if start < size:
                    yield address + start, min(HUGE_PAGE, size - start)

    def wait(self, timeout_s: float) -> bool:
        """Whether all is touched."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Before the regions go."""
        self._ended.set()
        if self._thread is not threading.current_thread():  # in which a garbage collector may close an engine
            self._thread.join()
