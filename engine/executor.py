"""Executors: how the driver reaches the ranks. The scheduler and everything above see this interface only.

- `LocalExecutor`: one rank, in this process.
- `MeshExecutor`: a channel to each rank. The ranks are child processes (`start_own_ranks`) or were there before,
  under torchrun (`join_torchrun`); steps, replies and failures look the same.
"""

import queue
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import reduction
from typing import Any, NoReturn

import torch

from ..config import InferenceConfig
from ..mesh.channel import Channel, Inbox
from ..mesh.launch import Failure, RankFailure, RankPlace, portable
from ..mesh.own_ranks import RankProcesses
from ..mesh.process_group_mesh import check_topology
from ..mesh.torchrun import connect_to_driver
from ..shardformer import Checkpoint
from .model_runner import RunningStep
from .rank import Call, Published, Reply, Stop, make_worker, serve
from .step import StepInput, StepOutput
from .worker import Worker

_LAST_WORDS_S = 1.0  # how long the driver waits for a better explanation than that a collective failed


class Executor(ABC):
    """Runs steps on the ranks of every replica."""

    @abstractmethod
    def begin(self, method: str, *arguments: Any) -> Callable[[], list[Any]]:
        """Lets every rank begin with a `Worker` method, after the steps that it has; the result waits."""

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Runs a `Worker` method on every rank; its results by rank. What changes a rank wants no step in flight."""
        return self.begin(method, *arguments)()

    @abstractmethod
    def submit(self, replica: int, step: StepInput) -> None:
        """Hands a step to a replica's ranks. A replica's steps come back in the order of their submission."""

    @abstractmethod
    def collect(self) -> tuple[int, StepOutput]:
        """Waits for the next step of any replica: (replica, output). Raises RankFailure if a rank is lost."""

    @abstractmethod
    def look(self) -> None:
        """Raises RankFailure if a rank is lost; no step is in flight."""

    @abstractmethod
    def close(self) -> None:
        """Ends the ranks; can be called twice."""


class LocalExecutor(Executor):
    """A world of one rank, in this process."""

    def __init__(self, config: InferenceConfig, device: torch.device) -> None:
        self.worker: Worker | None = make_worker(config, device)
        self._launches = device.type == "cuda"
        # What the current device is differs from thread to thread, and with another engine.
        self._on_device: Callable[[], AbstractContextManager[Any]] = (
            partial(torch.cuda.device, device) if self._launches else nullcontext
        )
        self._steps: deque[StepInput] = deque()
        self._running: deque[RunningStep] = deque()  # the first of these

    def begin(self, method: str, *arguments: Any) -> Callable[[], list[Any]]:
        def call() -> list[Any]:
            with self._on_device():
                return [getattr(self.worker, method)(*arguments)]

        return call

    def submit(self, replica: int, step: StepInput) -> None:
        self._steps.append(step)
        if self._launches:  # and computes it while the caller goes on
            self._launch()

    def collect(self) -> tuple[int, StepOutput]:
        if not self._running:
            self._launch()
        try:
            with self._on_device():
                output = self._running[0].wait()
        except Exception as error:
            raise _failed(error) from error
        assert output is not None
        self._running.popleft()
        self._steps.popleft()  # only now: a step that is interrupted is done again
        return 0, output

    def look(self) -> None:
        """The rank is this process."""

    def _launch(self) -> None:
        assert self.worker is not None
        try:
            with self._on_device():
                self._running.append(self.worker.launch(self._steps[len(self._running)]))
        except Exception as error:
            raise _failed(error) from error

    def close(self) -> None:
        if self.worker is not None:
            self.worker.let_go()
        self.worker = None  # and with it the weights and the cache
        self._running.clear()


def _failed(error: Exception) -> RankFailure:
    """As from any rank; the error's own traceback is the cause."""
    return RankFailure(f"rank 0 failed: {type(error).__name__}: {error}")


class MeshExecutor(Executor):
    """Many ranks, each behind a channel; rank = (dp, pp, tp) row-major.

    failure: makes the exception for a rank that is lost (rank, its traceback if it sent one).
    shut_down: ends the ranks' processes once they were told to stop.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        config: InferenceConfig,
        failure: Callable[[int, str], RankFailure],
        shut_down: Callable[[], None],
    ) -> None:
        self.channels = list(channels)
        self._failure, self._shut_down = failure, shut_down
        self._ranks_per_replica = config.pp_size * config.tp_size
        self._inbox = Inbox(self.channels)
        self._outputs: deque[tuple[int, StepOutput]] = deque()  # that came while replies were waited for
        self._closed = False

    def begin(self, method: str, *arguments: Any) -> Callable[[], list[Any]]:
        self._send(range(len(self.channels)), Call(method, arguments))
        return self.replies

    def replies(self, timeout_s: float | None = None) -> list[Any]:
        """One reply from every rank, by rank."""
        found: dict[int, Any] = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(found) < len(self.channels):
            rank, message = self._receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if rank < 0:
                missing = sorted(set(range(len(self.channels))) - set(found))
                raise self._failure(missing[0], f"no answer from ranks {missing} within start_timeout_s={timeout_s:g}")
            if isinstance(message, StepOutput):
                self._outputs.append((rank // self._ranks_per_replica, message))
                continue
            assert isinstance(message, Reply)
            found[rank] = message.value
        return [found[rank] for rank in range(len(self.channels))]

    def submit(self, replica: int, step: StepInput) -> None:
        first = replica * self._ranks_per_replica
        self._send(range(first, first + self._ranks_per_replica), step)

    def collect(self) -> tuple[int, StepOutput]:
        if self._outputs:
            return self._outputs.popleft()
        rank, message = self._receive(None)
        assert isinstance(message, StepOutput)
        return rank // self._ranks_per_replica, message

    def look(self) -> None:
        if self._inbox.wait(0):
            self._receive(None)  # ranks that nothing is asked of say nothing but that they have failed

    def publish(self, message: Published) -> None:
        """Tells every other rank under torchrun what a collective call gives; one that is gone is passed over."""
        if message.error is not None:
            message = replace(message, error=portable(message.error))
        data = reduction.ForkingPickler.dumps(message)
        for channel in self.channels[1:]:
            with suppress(OSError):
                channel.send_bytes(data)

    def _send(self, ranks: Sequence[int], message: Any) -> None:
        data = reduction.ForkingPickler.dumps(message)  # once for all of them
        for rank in ranks:
            try:
                self.channels[rank].send_bytes(data)
            except OSError:
                self._lost(rank, {})

    def _receive(self, timeout_s: float | None) -> tuple[int, Any]:
        """The next message: (rank, message); (-1, None) when the time is up."""
        ready = self._inbox.wait(timeout_s)
        if not ready:
            return -1, None
        rank = ready[0]
        try:
            message = self.channels[rank].recv()
        except (EOFError, OSError):
            self._lost(rank, {rank: None})
        if isinstance(message, Failure):
            self._lost(rank, {rank: message})
        return rank, message

    def _lost(self, rank: int, found: dict[int, Failure | None]) -> NoReturn:
        """Raises for the rank that fell first, `rank` being one that has failed or cannot be reached.

        found: last words so far, None of a rank that went without. A rank that lost its peer is not the one to name,
        and so the others are listened to for a moment.
        """
        deadline = time.monotonic() + _LAST_WORDS_S
        while not (fell := [r for r, words in found.items() if words is None or not words.lost_peer]):
            ready = self._inbox.wait(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for other in ready:
                try:
                    message = self.channels[other].recv()
                except (EOFError, OSError):
                    self._inbox.drop(other)
                    found.setdefault(other, None)
                    continue
                if isinstance(message, Failure):
                    found[other] = message
        culprit = next(iter(fell or found), rank)
        words = found.get(culprit)
        if words is not None and words.error is not None:
            raise words.error
        raise self._failure(culprit, "" if words is None else words.traceback)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.close()
        for channel in self.channels:
            with suppress(OSError):  # gone already
                channel.send(Stop())
        self._shut_down()
        for channel in self.channels:
            channel.close()


def rank_name(config: InferenceConfig, rank: int) -> str:
    """A rank with its coordinate, for messages."""
    dp, rest = divmod(rank, config.pp_size * config.tp_size)
    pp, tp = divmod(rest, config.tp_size)
    return f"rank {rank} (dp {dp}, pp {pp}, tp {tp})"


def start_own_ranks(config: InferenceConfig, devices: Sequence[torch.device]) -> MeshExecutor:
    """Starts one child process for each rank and waits until all have met."""
    processes = RankProcesses(
        config.world_size,
        "meshlm.engine.rank:run_own_rank",
        lambda rank: rank_name(config, rank),
        fork=all(device.type == "cpu" for device in devices),  # what a GPU's driver has begun does not survive a fork
    )
    channels = [Channel(connection) for connection in processes.connections]
    executor = MeshExecutor(channels, config, processes.failure, processes.close)
    try:
        for channel, device in zip(channels, devices, strict=True):
            with suppress(OSError):  # it has died already; waiting for its reply says of what
                channel.send((config, str(device), channel.offer()))
        for channel, accepted in zip(channels, executor.replies(config.start_timeout_s), strict=True):
            channel.share(accepted)
    except BaseException:
        executor.close()
        raise
    return executor


class Follower:
    """A rank under torchrun that does not drive: its worker runs in a thread, its caller waits for what rank 0 says."""

    def __init__(self, channel: Channel, worker: Worker) -> None:
        self._mesh = worker.mesh
        self._published: queue.SimpleQueue[Published | None] = queue.SimpleQueue()
        self._kept: dict[int, deque[Published]] = defaultdict(deque)  # by call: several streams can go on at once
        self._left: set[int] = set()  # calls whose results nobody waits for any more, and whose last is still to come
        self._thread = threading.Thread(target=self._serve, args=(channel, worker), daemon=True)
        self._thread.start()

    def _serve(self, channel: Channel, worker: Worker) -> None:
        try:
            with channel, suppress(EOFError, OSError):
                if serve(channel, worker, self._published.put):
                    return
                # The worker is lost; what rank 0 makes of that is still to be told.
                while not isinstance(message := channel.recv(), Stop):
                    if isinstance(message, Published):
                        self._published.put(message)
        finally:
            self._published.put(None)

    def receive(self, call: int) -> Published:
        """The next thing that rank 0 published for a call."""
        while not self._kept[call]:
            message = self._published.get()
            if message is None:
                self._published.put(None)
                raise RankFailure("rank 0, which drives, has closed the engine or is gone")
            if message.call not in self._left:
                self._kept[message.call].append(message)
            elif message.is_last:
                self._left.remove(message.call)
        message = self._kept[call].popleft()
        if message.is_last:
            del self._kept[call]
        return message

    def leave(self, call: int) -> None:
        """Nobody will `receive` the rest of this call's results; the last of them was not received."""
        kept = self._kept.pop(call, None)
        if not kept or not kept[-1].is_last:
            self._left.add(call)

    def close(self) -> None:
        """Waits until rank 0 has closed the engine, and destroys the mesh's groups."""
        self._thread.join()
        self._mesh.destroy()


def join_torchrun(
    config: InferenceConfig, place: RankPlace, device: torch.device, checkpoint: Checkpoint
) -> tuple[MeshExecutor | None, Follower | None]:
    """Makes an engine's ranks of those that have joined; collective. Gives rank 0 an executor, the others a follower.

    checkpoint: what this rank is to load, which its own caller has opened.
    """
    worker = make_worker(config, device)
    worker.checkpoint, mesh = checkpoint, worker.mesh
    try:
        channels, own = connect_to_driver(place, config.start_timeout_s)
    except BaseException:
        mesh.destroy()
        raise
    if place.rank != 0:
        return None, Follower(own, worker)
    thread = threading.Thread(target=serve, args=(own, worker, lambda _: None), daemon=True)
    thread.start()

    def failure(rank: int, said: str) -> RankFailure:
        words = said.strip() or "its connection has ended; its own output may say more"
        return RankFailure(f"{rank_name(config, rank)} failed: {words}")

    def leave() -> None:
        thread.join(5.0)
        mesh.destroy()

    return MeshExecutor(channels, config, failure, leave), None


def warn_if_tp_spans_hosts(config: InferenceConfig, hosts: Sequence[str]) -> None:
    """One warning, with the numbers, where tensor parallelism would go over the network."""
    sizes = {"dp": config.dp_size, "pp": config.pp_size, "tp": config.tp_size}
    warning = check_topology(sizes, "tp", hosts)
    if warning:
        warnings.warn(warning, stacklevel=3)
