"""The three worlds behind one interface: in this process, on ranks of our own, on the ranks that torchrun started.

Above this file nothing knows which it is. A call of the public API goes through `everywhere`: on the driver it runs,
and under torchrun every rank returns what it gave, or raises what it raised.
"""

import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ..config import InferenceConfig
from ..mesh.collectives import Communicator
from ..mesh.interrupts import uninterrupted
from ..mesh.launch import RankFailure, RankPlace
from ..shardformer import Checkpoint
from ..shardformer.sources import ModuleSource, SafetensorsSource
from .executor import Executor, Follower, LocalExecutor, MeshExecutor, join_torchrun, start_own_ranks
from .plan import check_alike, settings
from .rank import Published, join_ranks

T = TypeVar("T")


class World:
    """The ranks that run an engine.

    place: this rank's under torchrun, else None.
    checkpoint: what this rank is to load under torchrun, where the driver's call does not bring it.
    """

    def __init__(
        self, config: InferenceConfig, devices: Sequence[torch.device], place: RankPlace | None, checkpoint: Checkpoint
    ) -> None:
        self._call = 0
        self._executor: Executor | None = None
        self._follower: Follower | None = None
        self._joined = False  # under torchrun, with other ranks
        own_group = False
        if config.world_size == 1:
            self._executor = LocalExecutor(config, devices[0])
        elif place is None:
            self._executor = start_own_ranks(config, devices)
        else:
            own_group, device = not dist.is_initialized(), devices[place.local_rank]
            try:
                join_ranks(config, place, None, device)
                _compare_ranks(config, device, checkpoint)
                self._executor, self._follower = join_torchrun(config, place, device, checkpoint)
            except BaseException:
                _destroy_group(own_group)
                raise
            self._joined = True
        self._finalizer = weakref.finalize(self, _close, os.getpid(), self._executor, self._follower, own_group)

    @property
    def executor(self) -> Executor:
        """The way to the ranks; on the driver only."""
        assert self._executor is not None
        return self._executor

    @property
    def is_driver(self) -> bool:
        """Whether calls run here; False on the ranks of torchrun that follow."""
        return self._follower is None

    def begin(self, method: str, *arguments: Any) -> Callable[[], list[Any]]:
        """Lets every rank begin with a `Worker` method; on the driver, the result waits for their answers."""
        return list if self._executor is None else self._executor.begin(method, *arguments)

    def begin_load(self, checkpoint: Checkpoint, files: ExitStack) -> Callable[[], list[Any]]:
        """Lets every rank begin to load its weights, as `begin` does; `files` stay until all have answered."""
        if self._joined:
            return self.begin("load")  # each rank has opened the checkpoint itself
        if isinstance(self._executor, MeshExecutor):
            checkpoint = for_other_processes(checkpoint, files)
        return self.begin("load", checkpoint)

    def everywhere(self, function: Callable[[], T]) -> T:
        """Runs `function` on the driver; every rank returns its value or raises its error."""
        self._check_open()
        if self._follower is not None:
            return cast(T, self._receive(self._follower))
        # An interrupt finds the call not begun, or `function` at work, or all told: the others never wait in vain.
        with uninterrupted() as interruptible:
            self._call += 1
            call = self._call
            try:
                with interruptible():
                    value = function()
            except BaseException as error:
                self._publish(Published(call, error=_for_followers(error)))
                self._explain_if_closed(error)
                self._close_if_lost(error)
                raise
            self._publish(Published(call, value))
        return value

    def _receive(self, follower: Follower) -> Any:
        self._call += 1
        call = self._call
        try:
            message = follower.receive(call)
        except BaseException:  # interrupted
            follower.leave(call)
            raise
        self._raise_error_of(message)
        return message.value

    def each_everywhere(self, function: Callable[[], Iterable[T]]) -> Iterator[T]:
        """As `everywhere`, for what `function` yields, item by item."""
        self._check_open()
        self._call += 1
        return self._drive(function, self._call) if self._follower is None else self._follow(self._call)

    def _drive(self, function: Callable[[], Iterable[T]], call: int) -> Iterator[T]:
        told = False

        def tell(message: Published) -> None:
            nonlocal told
            with uninterrupted():
                if not told:
                    self._publish(message)
                    told = message.is_last

        try:
            try:
                self._check_open()
                for item in function():
                    tell(Published(call, item, is_last=False))
                    yield item
                    if not self._finalizer.alive:
                        break
                tell(Published(call))
            except GeneratorExit:  # the caller has seen enough
                tell(Published(call))
                raise
            except BaseException as error:
                tell(Published(call, error=_for_followers(error)))
                self._explain_if_closed(error)
                self._close_if_lost(error)
                raise
        except BaseException as error:  # told, unless an interrupt came just before
            tell(Published(call, error=_for_followers(error)))
            raise
        self._check_open()

    def _follow(self, call: int) -> Iterator[Any]:
        assert self._follower is not None
        self._check_open()
        message = None
        try:
            while self._finalizer.alive and not (message := self._follower.receive(call)).is_last:
                yield message.value
        finally:
            if message is None or not message.is_last:
                self._follower.leave(call)
        if message is not None:
            self._raise_error_of(message)
        self._check_open()

    def _raise_error_of(self, message: Published) -> None:
        if message.error is not None:
            self._close_if_lost(message.error)
            raise message.error

    def _publish(self, message: Published) -> None:
        if self._joined and isinstance(self._executor, MeshExecutor) and self._finalizer.alive:
            self._executor.publish(message)

    def _close_if_lost(self, error: BaseException) -> None:
        if isinstance(error, RankFailure):  # nothing works without that rank
            self.close()

    def _check_open(self, cause: Exception | None = None) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the engine is closed; make a new InferenceEngine") from cause

    def _explain_if_closed(self, error: BaseException) -> None:
        """What fails because another thread, or the caller between two items, has closed the engine says just that."""
        if isinstance(error, Exception):
            self._check_open(cause=error)

    def close(self) -> None:
        """Ends the ranks, or takes leave of them; can be called twice."""
        self._finalizer()


def _close(pid: int, executor: Executor | None, follower: Follower | None, own_group: bool) -> None:
    if os.getpid() != pid:
        return  # a fork of the caller's has come to its end, not the caller
    if executor is not None:
        executor.close()
    if follower is not None:
        follower.close()
    _destroy_group(own_group)


def _compare_ranks(config: InferenceConfig, device: torch.device, checkpoint: Checkpoint) -> None:
    """Raises ConfigError on every rank unless all were given the same; collective."""
    world = Communicator(dist.group.WORLD, "world", config.collective_timeout_s)
    check_alike(world.all_gather_object(settings(config, device, checkpoint)))


def _destroy_group(own_group: bool) -> None:
    if own_group and dist.is_initialized():
        dist.destroy_process_group()


def _for_followers(error: BaseException) -> Exception:
    """What the other ranks raise for an error on rank 0; they are not interrupted themselves, nor to exit."""
    if isinstance(error, Exception):
        return error
    return InterruptedError(f"rank 0 was interrupted: {type(error).__name__}")


def for_other_processes(checkpoint: Checkpoint, files: ExitStack) -> Checkpoint:
    """The checkpoint as other processes on this host can open it, until `files` is closed.

    The weights of a module that lives in this process go into a file without a name (or, where the system has no such
    files, into a temporary one): nothing is left behind, however this process ends.
    """
    source = checkpoint.source
    if not isinstance(source, ModuleSource):
        return checkpoint
    names = list(checkpoint.spec.shapes())
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("meshlm-weights")
        files.callback(os.close, fd)
        path = f"/proc/{os.getpid()}/fd/{fd}"
    else:
        folder = files.enter_context(tempfile.TemporaryDirectory(prefix="meshlm-"))
        path = f"{folder}/model.safetensors"
    source.save(path, names)
    return replace(checkpoint, source=SafetensorsSource(Path(path)))
