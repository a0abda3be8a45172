"""A server in the tests' own process; `server` in tests/serving/conftest.py is one for the whole session."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from meshlm.engine.async_engine import AsyncInferenceEngine
from meshlm.engine.output import RequestOutput
from meshlm.serving.api import Service, create_app


@dataclass(frozen=True)
class Server:
    url: str
    engine: AsyncInferenceEngine
    service: Service

    def offline(self, prompt: Any, **params: Any) -> RequestOutput:
        """What the engine itself gives."""

        async def last() -> RequestOutput:
            return await (await self.engine.add(prompt, params)).last()

        return asyncio.run(last())

    def wait_until_idle(self, limit_s: float = 10.0) -> None:
        """Until nothing is under way and every block is free. Raises AssertionError."""
        until = time.monotonic() + limit_s
        while self.engine.num_unfinished or not self._all_blocks_are_free:
            assert time.monotonic() < until, "a request still holds something"
            time.sleep(0.01)

    @property
    def _all_blocks_are_free(self) -> bool:
        return all(replica.num_free_blocks == replica.num_blocks for replica in self.engine.stats().replicas)


@contextmanager
def serving(service: Service) -> Iterator[Server]:
    """uvicorn in a thread, on a free port."""
    running = uvicorn.Server(uvicorn.Config(create_app(service), "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", service.engine, service)
    running.should_exit = True
    thread.join()
