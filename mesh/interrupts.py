"""Ctrl-C, which is to find nothing half done. It reaches the main thread alone; in others nothing is held back.

A handler that is set costs a step more than most of what the step does beside the model. So one is set for as long as a
call lasts, and within it only what that one does is changed.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any


class _Gate:
    """Holds interrupts back from the handler behind it, but while it is open; as a context, it is."""

    def __init__(self, behind: Callable[[int, FrameType | None], object]) -> None:
        self.behind = behind
        self.is_open = False
        self.lets_second = False  # whether only the first is held
        self._held: list[tuple[int, FrameType | None]] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_open or (self.lets_second and self._held):
            self.forget()
            self.behind(number, frame)
        else:
            self._held.append((number, frame))

    def forget(self) -> None:
        self._held.clear()

    def release(self) -> None:
        """Lets the handler have what was held."""
        if self._held:
            first = self._held[0]
            self.forget()
            self.behind(*first)

    def __enter__(self) -> None:
        self.is_open = True
        try:
            self.release()
        except BaseException:
            self.is_open = False
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.is_open = False


@contextmanager
def uninterrupted() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Holds a Ctrl-C back until the block has ended.

    Gives a context for a part of the block that is to be interrupted all the same.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield nullcontext
        return
    gate = _Gate(handler)
    signal.signal(signal.SIGINT, gate)
    try:
        yield lambda: gate
    finally:
        signal.signal(signal.SIGINT, handler)
        gate.release()


@contextmanager
def interrupt_between_steps() -> Iterator[None]:
    """Holds Ctrl-C back until a step, or a change, is done; a second one does not wait. A caller that has a way of its
    own with it keeps that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        with uninterrupted() as interruptible, interruptible(), interrupt_between_steps():
            yield
    elif not isinstance(handler, _Gate) or _let_through(handler) is not signal.default_int_handler:
        yield
    else:
        handler.is_open, handler.lets_second = False, True
        try:
            yield
        except BaseException:  # of which the caller hears, rather than of the interrupt
            handler.forget()
            raise
        finally:
            handler.is_open, handler.lets_second = True, False
        handler.release()


def _let_through(handler: Any) -> Any:
    """What an interrupt comes to behind gates that are open."""
    while isinstance(handler, _Gate) and handler.is_open:
        handler = handler.behind
    return handler
