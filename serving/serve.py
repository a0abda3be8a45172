"""A server's life: the engine, the application, the signals that end it.

    SIGTERM, Ctrl-C   no new requests (503, not ready); those there are have `drain_s` seconds, then end as they are
    a second one      they end at once
    a rank is lost    every request fails, and the process ends with exit code 1

Under torchrun rank 0 serves. A signal on any host goes to rank 0 by torchrun's store, and the others stay until it is
done.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist
import uvicorn
from fastapi import FastAPI

from ..config import InferenceConfig
from ..engine.async_engine import AsyncInferenceEngine
from ..mesh.torchrun import torchrun_place
from ..shardformer import Model
from .api import Service, create_app
from .connection import Connection

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS_S = 5.0  # for answers to go out, once draining has ended
_POLL_S = 1.0  # how often rank 0 looks whether another host has been told to end
_KEEP_ALIVE_S = 75  # of an idle connection: longer than the proxies that may stand before a server keep theirs


def serve(
    model: Model,
    config: InferenceConfig,
    *,
    new_service: Callable[[AsyncInferenceEngine], Service],
    host: str,
    port: int,
    drain_s: float,
    max_queued: int,
    tokenizer: Any = None,
) -> int:
    """Serves until a signal comes; gives the exit code. Under torchrun rank 0 serves and the others work with it.

    port: 0 for any that is free.
    Raises as `InferenceEngine` does, before anything is served.
    """
    place = torchrun_place()
    if place is not None and place.rank:
        with AsyncInferenceEngine(model, config, tokenizer) as engine:
            return _follow(engine)
    try:
        listener = bind(host, port)
    except OSError as error:
        return _fail(f"cannot listen on {host}, port {port}: {error.strerror or error}; give another host or port")
    told = threading.Event()
    with closing(listener), AsyncInferenceEngine(model, config, tokenizer, max_queued=max_queued) as engine:
        service = new_service(engine)
        server = Server(service, create_app(service), listener, drain_s)
        if place is not None and place.world_size > 1:
            threading.Thread(target=_watch, args=(server.drain, told), daemon=True).start()
        try:
            server.run([listener])
        except OSError as error:
            return _fail(f"cannot listen on {server.address}: {error.strerror or error}")
        if engine.error is not None:
            return _fail(f"the engine has ended: {engine.error}")
    if told.is_set() and "TORCHELASTIC_RUN_ID" in os.environ:
        # It would wait five minutes for the torchrun of the host that was told, which is gone.
        os.kill(os.getppid(), signal.SIGTERM)
    return 0


def _fail(why: str) -> int:
    print(f"meshlm serve: error: {why}", file=sys.stderr, flush=True)
    return 1


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet: nobody is to wait at it while the weights are loaded."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """Says when it is ready, drains before it ends, and ends when the engine does."""

    def __init__(self, service: Service, app: FastAPI, listener: socket.socket, drain_s: float) -> None:
        self._service, self._drain_s = service, drain_s
        self._until = math.inf  # when draining ends
        self._signalled = False
        host, port = listener.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,  # whoever reads has had the answer by then
                **quiet,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        config = self._service.engine.config
        mesh = f"mesh dp={config.dp_size} × pp={config.pp_size} × tp={config.tp_size}"
        print(f"serving {self._service.model_name} on {self.address} ({mesh})", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._end_within(0.0 if self._signalled else self._drain_s)
        self._signalled = True

    def drain(self) -> None:
        """Takes no new requests, and ends with those that there are. From any thread."""
        self._end_within(self._drain_s)

    def _end_within(self, limit_s: float) -> None:
        self._service.is_draining = True
        self._until = min(self._until, time.monotonic() + limit_s)

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self._may_exit()
        return await super().on_tick(counter)

    def _may_exit(self) -> bool:
        """Whether all that was asked is answered, or the time for it is over; connections are served until then."""
        engine = self._service.engine
        if not engine.is_alive:
            self._end_within(0.0)
        if math.isinf(self._until):
            return False
        if not engine.num_unfinished and not self.server_state.tasks:
            return True
        overdue_s = time.monotonic() - self._until
        if overdue_s >= 0:
            engine.abort_all()
        return overdue_s >= _LAST_WORDS_S


# ---- several hosts ----------------------------------------------------------------------------------------------


class _Bell:
    """How a rank of torchrun that is told to end tells rank 0: a key in torchrun's store."""

    def __init__(self) -> None:
        environ = os.environ
        self._key = f"meshlm/end/{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = dist.TCPStore(
            environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )

    def ring(self) -> None:
        self._store.set(self._key, "")

    def has_rung(self) -> bool:
        return bool(self._store.check([self._key]))


def _watch(drain: Callable[[], None], told: threading.Event) -> None:
    """On rank 0. A store that is gone says nothing: its torchrun has ended, and tells its own ranks."""
    with suppress(RuntimeError):
        bell = _Bell()
        while not bell.has_rung():
            time.sleep(_POLL_S)
        told.set()
        drain()


def _follow(engine: AsyncInferenceEngine) -> int:
    """On the other ranks; told to end, they tell rank 0. A second signal ends this one at once, and all with it."""

    def tell(sig: int, frame: FrameType | None) -> None:
        signal.signal(sig, signal.SIG_DFL)
        with suppress(RuntimeError):
            bell.ring()

    try:
        bell = _Bell()
        for sig in SIGNALS:
            signal.signal(sig, tell)
        engine.follow()
    except RuntimeError as error:
        return _fail(str(error))
    return 0
