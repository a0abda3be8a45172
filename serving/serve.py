"""A server's life: the engine, the application, the signals that end it.

    SIGTERM, Ctrl-C   no new requests (503, not ready); those there are have `drain_s` seconds to end
    a second one      at once
    a rank is lost    every request fails, and the process ends with exit code 1
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from ..config import InferenceConfig
from ..engine.async_engine import AsyncInferenceEngine
from ..shardformer import Model
from .api import Service, create_app


def serve(
    model: Model,
    config: InferenceConfig,
    *,
    new_service: Callable[[AsyncInferenceEngine], Service],
    host: str,
    port: int,
    drain_s: float,
    max_queued: int,
) -> int:
    """Serves until a signal comes; gives the exit code. Under torchrun rank 0 serves and the others work with it."""
    with AsyncInferenceEngine(model, config, max_queued=max_queued) as engine:
        if not engine.engine.is_driver:
            engine.follow()
            return 0
        service = new_service(engine)
        server = _Server(service, host, port, drain_s)
        engine.when_it_ends(server.end)
        server.run()
        return 1 if engine.error is not None else 0


class _Server(uvicorn.Server):
    """Drains before it ends."""

    def __init__(self, service: Service, host: str, port: int, drain_s: float) -> None:
        self._service = service
        settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": round(drain_s)}
        super().__init__(uvicorn.Config(create_app(service), host, port, server_header=False, **settings))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second time
        self.end()

    def end(self) -> None:
        self._service.is_draining = True
        self.should_exit = True


SIGNALS = (signal.SIGTERM, signal.SIGINT)
