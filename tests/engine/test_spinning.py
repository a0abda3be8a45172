"""SpinGuard: when threads are let to sleep; and that a team does that, and goes."""

import os
import time

import torch

from meshlm.engine.spinning import IdleTeam, SpinGuard, seconds_waited, spin_guard


class Machine:
    """A clock, and what threads have waited by it."""

    def __init__(self) -> None:
        self.now = self.waited = 0.0
        self.teams = 0
        self.guard = SpinGuard(lambda: self.waited, self.new_team, lambda: self.now)

    def new_team(self) -> "Machine":
        self.teams += 1
        return self

    def end(self) -> None:
        self.teams -= 1

    def run(self, seconds: float, share: float) -> float:
        """Steps of 10 ms in which threads wait for such a share of the time; the share of them in which they slept."""
        slept = 0
        for _ in range(round(seconds / 0.01)):
            self.now += 0.01
            self.waited += share * 0.01
            self.guard.look()
            assert self.teams == self.guard.sleeps
            slept += self.guard.sleeps
        return slept / round(seconds / 0.01)


def test_threads_sleep_while_others_want_the_cores() -> None:
    machine = Machine()
    assert machine.run(10, share=0.1) == 0
    assert machine.run(30, share=0.5) > 0.8
    machine.run(10, share=0.0)  # the last pause ends
    assert machine.run(10, share=0.0) == 0
    assert machine.run(1.3, share=0.5) > 0.6, "and anew, beginning with a short pause"
    machine.guard.let_go()
    assert machine.teams == 0


def test_one_thread_needs_no_guard() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert spin_guard() is None
        torch.set_num_threads(2)
        assert spin_guard() is not None
    finally:
        torch.set_num_threads(threads)


def test_a_team_comes_and_goes() -> None:
    """Its threads do nothing meanwhile, and ops go on as before."""
    x = torch.ones(1 << 17)
    x.add_(1)
    before = len(os.listdir("/proc/self/task"))
    team = IdleTeam()
    try:
        assert len(os.listdir("/proc/self/task")) > before
        x.add_(1)
        assert bool((x == 3).all())
    finally:
        team.end()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) <= before
    assert seconds_waited() >= 0
