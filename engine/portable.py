"""Callables that a user wrote, on their way to other processes."""

import pickle
from collections.abc import Callable
from typing import Any


class Portable:
    """A callable that can be pickled wherever it was defined: a lambda, a closure, a function of a notebook.

    It is unpickled when it is first called, so that what fails then fails in that call, not in whoever received it.
    name: the field that it was given in.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        self._function: Callable[..., Any] | None = function
        self._pickled: bytes | None = None

    @property
    def pickled(self) -> bytes:
        """Raises ValueError, in one line, if that cannot be."""
        if self._pickled is None:
            import cloudpickle  # takes a while, and most requests bring no callable

            try:
                self._pickled = cloudpickle.dumps(self._function)
            except Exception as error:  # whatever the object's own __reduce__ raises
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(
                    f"{self.name}: {self._function!r} cannot be sent to the ranks' processes ({reason}); create what "
                    f"cannot be pickled, such as open files and locks, when it is called"
                ) from None
        return self._pickled

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            assert self._pickled is not None
            self._function = pickle.loads(self._pickled)
        return self._function(*arguments)

    def __reduce__(self) -> Any:
        return _unpickled, (self.pickled, self.name)


def _unpickled(pickled: bytes, name: str) -> Portable:
    portable = Portable.__new__(Portable)
    portable.name, portable._function, portable._pickled = name, None, pickled
    return portable
