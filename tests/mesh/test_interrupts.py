"""Ctrl-C within what holds it back, in all ways in which they lie within each other."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from meshlm.mesh.interrupts import interrupt_between_steps, uninterrupted


@pytest.fixture(autouse=True)
def handler_is_put_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after in (signal.default_int_handler, own)


seen: list[int] = []


def own(number: int, frame: Any) -> None:
    seen.append(number)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_held_until_the_block_has_ended() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        press()
        press()
        done.append("first")
    assert done == ["first"]
    with uninterrupted():
        pass


def test_part_of_a_block_is_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted() as interruptible:
        try:
            with interruptible():
                press()
                done.append("not reached")
        except KeyboardInterrupt:
            done.append("told")
            raise
    assert done == ["told"]


def test_what_was_held_before_that_part_interrupts_it_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted() as interruptible:
        press()
        with interruptible():
            done.append("not reached")
    assert not done


@pytest.mark.parametrize("within", [False, True])
def test_a_step_is_done_first(within: bool) -> None:
    done = []

    def step() -> None:
        with interrupt_between_steps():
            press()
            done.append("step")
        done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        _call(step, within)
    assert done == ["step"]


@pytest.mark.parametrize("within", [False, True])
def test_a_second_one_does_not_wait(within: bool) -> None:
    done = []

    def step() -> None:
        with interrupt_between_steps():
            press()
            done.append("first")
            press()
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        _call(step, within)
    assert done == ["first"]
    _call(lambda: None, within)  # nothing is left of it


@pytest.mark.parametrize("within", [False, True])
def test_a_callers_own_way_is_left_to_it(within: bool) -> None:
    signal.signal(signal.SIGINT, own)
    seen.clear()

    def step() -> None:
        with interrupt_between_steps():
            press()
            assert seen == [signal.SIGINT]

    _call(step, within)
    assert signal.getsignal(signal.SIGINT) is own


def test_a_call_within_a_change() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_between_steps():
        with uninterrupted() as interruptible, interruptible(), interrupt_between_steps():
            press()
            done.append("step")
        done.append("change")
    assert done == ["step", "change"]


def test_a_call_within_a_call() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted() as outer, outer():
        with uninterrupted() as inner, inner(), interrupt_between_steps():
            press()
            done.append("step")
        done.append("not reached")
    assert done == ["step"]


@pytest.mark.parametrize("within", [False, True])
def test_a_step_that_fails_says_so(within: bool) -> None:
    def step() -> None:
        with interrupt_between_steps():
            press()
            raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        _call(step, within)
    _call(lambda: None, within)


def test_other_threads_hold_nothing() -> None:
    done = []

    def hold() -> None:
        with uninterrupted() as interruptible, interruptible(), interrupt_between_steps():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def _call(step: Callable[[], None], within: bool) -> None:
    if not within:
        step()
        return
    with uninterrupted() as interruptible, interruptible():
        step()
