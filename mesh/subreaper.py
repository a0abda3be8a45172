"""Whose children the orphans are: on Linux, those of the nearest ancestor that asks for them (prctl(2))."""

import ctypes
import sys
import threading

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37


class _Subreaper:
    """This process adopts its orphaned descendants for as long as anyone wants it: seconds, while ranks start. A daemon
    that the caller's own program lets go of in that time becomes its child as well, and a zombie when it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._before = 0  # what the process was for itself

    def want(self) -> None:
        with self._lock:
            if not self._count:
                self._before = _get()
                _set(1)
            self._count += 1

    def unwant(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                _set(self._before)


subreaper = _Subreaper()


def can_reap_grandchildren() -> bool:
    return sys.platform == "linux"


def _get() -> int:
    value = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value))
    return value.value


def _set(value: int) -> None:
    _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(value))


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")
