"""An engine as the thread drives it that serves: requests come and go between two steps.

All of it happens within one collective call, `InferenceEngine.drive`, on the driver alone; none of it is collective.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .core import EngineCore
from .prompts import PreparedRequest
from .request import Request
from .requests import Requests
from .stats import EngineStats


class Driver:
    """What `AsyncInferenceEngine` does with an engine; on the thread that drives, where nothing else is said."""

    def __init__(self, core: EngineCore, requests: Requests) -> None:
        self.core, self._requests = core, requests

    def drive(self, told: Callable[[Sequence[Request]], None], obey: Callable[[bool], bool]) -> None:
        """As `InferenceEngine.drive`."""
        core = self.core
        while True:
            if not core.has_unfinished:
                core.settle()
                core.executor.look()
            if not obey(not core.has_unfinished):
                return
            if core.has_unfinished:
                told(core.step())

    def begin(self, request: PreparedRequest, request_id: str) -> None:
        self._requests.add([request], [request_id])

    def end(self, request_id: str, silently: bool) -> None:
        """Ends a request; unless silently, the next step gives it for the last time."""
        self.core.abort(request_id, silently)

    def busy(self) -> list[dict[str, Any]]:
        """As `InferenceEngine.busy`, but steps in flight are not collected, and what they took is counted."""
        return self.core.executor.call("busy")

    def unfinished(self) -> list[Request]:
        """The requests that have not ended."""
        return self.core.unfinished

    def watch_ends(self, told: Callable[[Request], None]) -> None:
        """Lets `told` know, on the thread that drives, of every request that has ended, however it did."""
        self.core.observers.append(told)

    def stats(self) -> EngineStats:
        """As `InferenceEngine.stats`, from any thread: in the middle of a step perhaps."""
        return self.core.stats()

    def fresh_id(self) -> str:
        """A request id that no request in the core has. From any thread."""
        return self._requests.fresh_id()
