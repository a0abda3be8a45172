"""Threads that wait on cores which others want.

libgomp's threads spin for milliseconds before they sleep, so that an op finds them awake. On a core that somebody else
wants too, they use up by that the time that they are given, and are not let on when there is work: an op then waits for
the other's turn to end. How long they spin is read when the library is loaded, and no call changes it. But with more
threads than cores libgomp lets each sleep almost at once, and so one more team, which does nothing, is a switch.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch

from ..mesh.launch import available_cores

_LOOK_S = 0.2  # between two looks
_MUCH = 0.25  # of the time, in which threads that could have run waited for a core
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 8.0  # in which threads sleep, before it is tried again how it goes


class Team(Protocol):
    def end(self) -> None: ...


class SpinGuard:
    """Looks between steps whether this process's threads wait for cores, and lets them sleep, not spin, while they do.

    waited_s: how long they have waited since ever. new_team: begins with what lets them sleep.
    """

    def __init__(
        self,
        waited_s: Callable[[], float],
        new_team: Callable[[], Team],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waited_s, self._new_team, self._clock = waited_s, new_team, clock
        self._team: Team | None = None
        self._pause_s = _FIRST_PAUSE_S
        self._since = self._next = self._waited = 0.0
        self._begin()

    def look(self) -> None:
        """Between two steps."""
        now = self._clock()
        if now < self._next:
            return
        if self._team is not None:
            self.let_go()
            self._begin()
        elif self._waited_s() - self._waited > _MUCH * (now - self._since):
            self._team, self._next = self._new_team(), now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        else:
            self._pause_s = _FIRST_PAUSE_S
            self._begin()

    def _begin(self) -> None:
        self._since, self._waited = self._clock(), self._waited_s()
        self._next = self._since + _LOOK_S

    @property
    def sleeps(self) -> bool:
        """Whether threads sleep at once."""
        return self._team is not None

    def let_go(self) -> None:
        if self._team is not None:
            self._team.end()
            self._team = None


class IdleTeam:
    """Enough OpenMP threads that there are more than cores; they sleep until `end`."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="meshlm-openmp", daemon=True)
        self._thread.start()
        self._begun.wait()

    def _hold(self) -> None:
        with suppress(OSError, AttributeError):  # another way of threading
            begin = ctypes.CDLL(torch._C.__file__).GOMP_parallel
            nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
            num_threads = max(2, available_cores() - torch.get_num_threads() + 2)
            begin(nothing, None, ctypes.c_uint(num_threads), ctypes.c_uint(0))
        self._begun.set()
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()  # the team goes with its thread
        self._thread.join()


def seconds_waited() -> float:
    """How long this process's threads that could have run have waited for a core; 0 where the system does not say."""
    nanoseconds = 0
    with suppress(OSError):
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError), open(f"/proc/self/task/{thread}/schedstat") as stat:  # it may have ended
                nanoseconds += int(stat.read().split()[1])
    return nanoseconds / 1e9


def spin_guard() -> SpinGuard | None:
    """For this process's threads; None if there is one, which has nobody to wait for."""
    return SpinGuard(seconds_waited, IdleTeam) if torch.get_num_threads() > 1 else None
