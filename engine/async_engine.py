"""`AsyncInferenceEngine`: an `InferenceEngine` for asyncio, on a thread of its own.

    event loop                                          the engine's thread
    add(prompt) ── prepared by one more thread ──▶ commands ──▶ queued between two steps
    RequestStream ◀── one call for each step ──────────────── core.step()
    leaving the stream ─────────────────────────▶ commands ──▶ aborted between two steps

The thread alone touches the engine, in one call of `World.everywhere` that lasts until `close`: under torchrun the
other ranks follow it from their own `AsyncInferenceEngine.follow`. A stream keeps what has come since its reader last
looked as one output, so a slow reader holds up nobody and costs no more memory than its output has.
"""

import asyncio
import atexit
import copy
import ctypes
import math
import queue
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import mean
from types import TracebackType
from typing import Any, TypeVar

import torch

from ..config import InferenceConfig
from ..mesh.launch import RankFailure
from ..shardformer import Model
from .driving import Driver
from .engine import InferenceEngine
from .output import CompletionOutput, RequestOutput
from .prompts import PreparedRequest, Preparer, Prompt
from .request import Request
from .stats import EngineStats

T = TypeVar("T")
_LOOK_S = 1.0  # how often it is looked, while there is nothing to do, whether all ranks are there
_PATIENCE_S = 10.0  # of `close`, with a step that is under way


class QueueFull(RuntimeError):
    """More requests wait than `max_queued`. retry_after_s: when it may be worth another try, whole seconds."""

    def __init__(self, num_waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{num_waiting} requests are waiting already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RequestStream:
    """One request's outputs, as they come; an asynchronous iterator, to be left with `close` or `async with`.

    Each is the request's state so far; `delta` is what is new since the last that was read. The last one is `finished`.
    Raises what ended the engine, if that happens.
    """

    def __init__(self, engine: "AsyncInferenceEngine", request_id: str, request: PreparedRequest) -> None:
        self.request_id, self.request = request_id, request
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._unread: RequestOutput | None = None
        self._error: BaseException | None = None
        self.has_begun = self.has_ended = False  # something has come; nothing more will

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        while self._unread is None:
            if self._error is not None:
                raise self._error
            if self.has_ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        output, self._unread = self._unread, None
        return output

    async def last(self) -> RequestOutput:
        """Waits for the end."""
        latest = None
        async for output in self:
            latest = output
        assert latest is not None
        return latest

    def close(self, error: BaseException | None = None) -> None:
        """Aborts the request, unless it has ended; its blocks are free once the step that has it is back.

        error: what is raised to who still reads.
        """
        if not self.has_ended:
            self._end(error)
            self._engine._leave(self)

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, output: RequestOutput) -> None:
        if self.has_ended:
            return
        self.has_begun, self.has_ended = True, output.finished
        self._unread = output if self._unread is None else _joined(self._unread, output)
        self._arrived.set()

    def _end(self, error: BaseException | None) -> None:
        if not self.has_ended:
            self.has_ended, self._error = True, error
            self._arrived.set()


def _dismiss_omp_workers() -> None:
    """Ends the OpenMP workers that this thread's operations have had.

    They would never work again, and yet be counted: with more workers than cores libgomp puts each to sleep as soon as
    it has nothing to do, and waking them for every operation of a step takes 6 % of a decode on two cores.
    """
    with suppress(OSError, AttributeError):  # another way of threading, which has no such workers
        pause_hard = 2  # omp_pause_resource_t; soft, 1, may keep them
        ctypes.CDLL(torch._C.__file__).omp_pause_resource_all(pause_hard)


def _joined(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """The later one, with what is new since before the earlier one."""

    def grown(index: int, output: CompletionOutput) -> CompletionOutput:
        before = earlier.outputs[index].delta if index < len(earlier.outputs) else ""
        return replace(output, delta=before + output.delta) if before else output

    return replace(later, outputs=tuple(grown(index, output) for index, output in enumerate(later.outputs)))


class AsyncInferenceEngine:
    """Serves requests that come at any time, to any number of tasks of an event loop.

    model, config, tokenizer: as `InferenceEngine`, which is built here and waits until it is ready.
    max_queued: requests that may wait, at most, beside those of which something has come; `add` raises QueueFull for
        one more.

    Under torchrun every rank constructs it; rank 0 serves, and the others call `follow`.
    """

    def __init__(
        self,
        model: Model,
        config: InferenceConfig | None = None,
        tokenizer: Any = None,
        *,
        max_queued: int = 1024,
    ) -> None:
        self.max_queued = max_queued
        self.engine = InferenceEngine(model, config, tokenizer)
        self.config, self.tokenizer = self.engine.config, self.engine.tokenizer
        self.max_model_len = self.engine.max_model_len
        self.error: BaseException | None = None  # what ended the engine
        self.num_refused = 0  # requests that QueueFull was raised for
        self._streams: dict[str, RequestStream] = {}
        self._at_work: dict[str, RequestStream] = {}  # of requests that the core has; the engine's thread alone uses it
        self._calls: set[Future[Any]] = set()
        self._preparations: set[object] = set()  # that are under way or wait for their turn
        self._waits_s: deque[float] = deque(maxlen=32)  # of the latest requests, for their first tokens
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread: threading.Thread | None = None
        if self.engine.is_driver:
            self._driver = self.engine.driver
            # Tokenizers do not like to be shared: the engine's thread decodes with the other one.
            self._preparer = self.engine.preparer_with(copy.deepcopy(self.tokenizer))
            self._preparing = ThreadPoolExecutor(1, thread_name_prefix="meshlm-prepare")
            self._num_threads = torch.get_num_threads()
            _dismiss_omp_workers()
            self._thread = threading.Thread(target=self._work, name="meshlm-engine", daemon=True)
            self._thread.start()
        atexit.register(self.close)

    # ---- on the event loop --------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has come yet; those that come together count as one until they are prepared."""
        return len(self._preparations) + sum(not stream.has_begun for stream in list(self._streams.values()))

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    @property
    def is_alive(self) -> bool:
        return self.error is None and not self._closed

    async def add(self, prompt: Prompt, sampling_params: Any = None, request_id: str | None = None) -> RequestStream:
        """Queues a request: it joins the running batch with the next step. Gives its outputs as they come.

        Raises QueueFull; ValueError or TypeError, one line, for what cannot be served; RuntimeError once closed.
        """
        requests = await self._prepared(lambda preparer: [preparer.prepare(prompt, sampling_params)])
        return self._queue(requests, request_id)[0]

    async def submit(self, prepare: Callable[[Preparer], Sequence[PreparedRequest]]) -> list[RequestStream]:
        """Requests that `prepare` makes, as in `prepare`; queued all together. Raises as `add`, and what it raises."""
        return self._queue(await self._prepared(prepare))

    async def prepare(self, function: Callable[[Preparer], T]) -> T:
        """What `function` gives, in the thread that prepares requests and has a tokenizer of its own."""
        self._check()
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function, self._preparer)

    async def generate(self, prompt: Prompt, sampling_params: Any = None) -> AsyncIterator[RequestOutput]:
        """As `add`, for `async for`: leaving the loop aborts the request."""
        async with await self.add(prompt, sampling_params) as stream:
            async for output in stream:
                yield output

    async def run(self, prepare: Callable[[Preparer], Sequence[PreparedRequest]]) -> list[RequestOutput]:
        """As `submit`, of requests of another kind (`prepare_scores`, `prepare_embeddings`), to their ends."""
        streams = await self.submit(prepare)
        try:
            return [await stream.last() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    async def call(self, function: Callable[[Driver], T]) -> T:
        """What `function` gives, between two steps."""
        future: Future[T] = Future()
        self._calls.add(future)
        try:
            self._send(partial(self._answer, future, function))
            return await asyncio.wrap_future(future)
        finally:
            self._calls.discard(future)

    def abort_all(self) -> None:
        """Ends every request: its stream's last output says so, with finish_reason "abort"."""
        for stream in list(self._streams.values()):
            self._commands.put(partial(self._finish, stream))

    def stats(self) -> EngineStats:
        """As it is now, in the middle of a step perhaps."""
        return self._driver.stats()

    async def _prepared(self, prepare: Callable[[Preparer], Sequence[PreparedRequest]]) -> Sequence[PreparedRequest]:
        """What is being prepared has its place in the queue already."""
        self._check_room()
        place = object()
        self._preparations.add(place)
        try:
            return await self.prepare(prepare)
        finally:
            self._preparations.discard(place)

    def _queue(self, requests: Sequence[PreparedRequest], request_id: str | None = None) -> list[RequestStream]:
        """request_id: of the one that there is."""
        if request_id in self._streams:
            raise ValueError(f"request_id={request_id!r} is in use by a request that has not ended")
        return [self._begun(request, request_id or self._fresh_id()) for request in requests]

    def _fresh_id(self) -> str:
        return next(name for name in iter(self._driver.fresh_id, None) if name not in self._streams)

    def _begun(self, request: PreparedRequest, request_id: str) -> RequestStream:
        self._streams[request_id] = stream = RequestStream(self, request_id, request)
        self._send(partial(self._begin, stream))
        return stream

    def _send(self, command: Callable[[], None]) -> None:
        """Raises if the engine has ended. If it ends afterwards, whatever stands in `_streams` and `_calls` is told."""
        self._commands.put(command)
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"the engine has ended: {self.error}") from self.error
        if self._closed:
            raise RuntimeError("the engine is closed; make a new AsyncInferenceEngine")

    def _check_room(self) -> None:
        self._check()
        if (waiting := self.num_waiting) >= self.max_queued:
            self.num_refused += 1
            raise QueueFull(waiting, max(1, math.ceil(mean(tuple(self._waits_s) or (1.0,)))))

    def _leave(self, stream: RequestStream) -> None:
        self._forget(stream)
        self._commands.put(partial(self._abandon, stream))

    def _forget(self, stream: RequestStream) -> None:
        """A stream that has ended; its id may be another's by now."""
        if self._streams.get(stream.request_id) is stream:
            self._streams.pop(stream.request_id, None)

    def _deliver(self, outputs: Sequence[tuple[RequestStream, RequestOutput]]) -> None:
        for stream, output in outputs:
            if not stream.has_begun and output.timings.ttft_s is not None:
                self._waits_s.append(output.timings.ttft_s)
            stream._take(output)
            if output.finished:
                self._forget(stream)

    # ---- on the engine's thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)  # of this thread's operations
        try:
            self.engine.drive(self._step, self._obey)
        except BaseException as error:
            self.error = error
        ended = self.error or RuntimeError("the engine is closed")
        for stream in list(self._streams.values()):
            self._tell(stream._loop, partial(stream._end, ended))
        self._streams.clear()
        for future in list(self._calls):
            with suppress(InvalidStateError):  # cancelled
                future.set_exception(ended)

    def _obey(self, wait: bool) -> bool:
        """Does what was asked for since the last step; False once it is time to end. wait: a while, for the first."""
        while True:
            try:
                command = self._commands.get(wait, _LOOK_S)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _begin(self, stream: RequestStream) -> None:
        if stream.has_ended:  # left again
            return
        try:
            self._driver.begin(stream.request, stream.request_id)
        except Exception as error:
            self._forget(stream)
            self._tell(stream._loop, partial(stream._end, error))
            return
        self._at_work[stream.request_id] = stream

    def _abandon(self, stream: RequestStream) -> None:
        """Ends the request of a stream that has been left."""
        if self._at_work.get(stream.request_id) is stream:
            del self._at_work[stream.request_id]
            self._driver.end(stream.request_id, silently=True)

    def _finish(self, stream: RequestStream) -> None:
        """Ends a stream's request, of which the next step tells."""
        if self._at_work.get(stream.request_id) is stream:
            self._driver.end(stream.request_id, silently=False)

    def _answer(self, future: Future[T], function: Callable[[Driver], T]) -> None:
        if not future.set_running_or_notify_cancel():  # nobody waits any more
            return
        try:
            future.set_result(function(self._driver))
        except Exception as error:
            future.set_exception(error)
            if isinstance(error, RankFailure):  # nothing works without that rank
                raise

    def _step(self, moved: Sequence[Request]) -> None:
        """Passes on what a step has moved."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = defaultdict(list)
        for request in moved:
            stream = self._at_work.get(request.request_id)
            if stream is not None:
                if request.ended:
                    del self._at_work[request.request_id]
                by_loop[stream._loop].append((stream, request.output()))
        for loop, outputs in by_loop.items():
            if not self._tell(loop, partial(self._deliver, outputs)):
                for stream, _ in outputs:
                    self._forget(stream)
                    self._abandon(stream)

    def _tell(self, loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
        """False if the loop is closed, and with it all who waited."""
        try:
            loop.call_soon_threadsafe(function)
        except RuntimeError:
            return False
        return True

    # ---- its end ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """On the other ranks of torchrun: does rank 0's work with it until that closes. Raises what ended it."""
        assert not self.engine.is_driver
        self.engine.drive(self._step, self._obey)

    def close(self) -> None:
        """Ends the engine; unfinished requests raise. Can be called twice."""
        atexit.unregister(self.close)
        if not self._closed:
            self._closed = True
            if self._thread is not None:
                self._commands.put(None)
                self._thread.join(_PATIENCE_S)
                self._preparing.shutdown(wait=False)
            self.engine.close()

    def __enter__(self) -> "AsyncInferenceEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
