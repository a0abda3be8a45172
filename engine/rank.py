"""A rank's process: joining the others, and the loop that answers the driver.

The driver sends steps and calls over a channel, the rank's `Worker` does them, and what comes of it goes back:

    StepInput  ->  StepOutput    from tp 0 of the last stage; other ranks answer nothing
    Call       ->  Reply         from every rank
    anything   ->  Failure       a rank that failed has said so, and leaves the loop
    Published  ->                for this rank's own caller, under torchrun
    Stop       ->                the end
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from ..config import InferenceConfig
from ..mesh.channel import Channel
from ..mesh.collectives import Communicator
from ..mesh.launch import Failure, RankPlace, choose_backend, divide_threads, gpu_of, init_process_group
from ..mesh.process_group_mesh import ProcessGroupMesh
from .model_runner import RunningStep
from .step import StepInput
from .worker import Worker


@dataclass(frozen=True)
class Call:
    """Asks a rank to run one of its methods; it answers with a `Reply`, or a `Failure`."""

    method: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Stop:
    """Ends a rank's loop."""


@dataclass(frozen=True)
class Reply:
    """A rank's answer to a `Call`."""

    value: Any


@dataclass(frozen=True)
class Published:
    """What a collective call of the public API gave on the driver; under torchrun every rank returns the same."""

    call: int  # which call, counted alike on every rank
    value: Any = None
    error: Exception | None = None
    is_last: bool = True  # False: one item of several


def serve(channel: Channel, worker: Worker, publish: Callable[[Published], None] | None = None) -> bool:
    """Answers the driver until it says stop or goes away. A rank of the last stage, tp 0, answers for its replica.

    publish: takes what is not for the worker but for this rank's caller (under torchrun).
    Returns False if it failed; the driver was told.
    """
    try:
        return _serve(channel, worker, publish)
    finally:
        worker.let_go()


def _serve(channel: Channel, worker: Worker, publish: Callable[[Published], None] | None) -> bool:
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)  # the current device is a thread's own
    answers = worker.mesh.coordinate("tp") == 0
    running: deque[RunningStep] = deque()
    while True:
        try:
            # What has come is begun with before anything is waited for: so a GPU always has something to do.
            ready = running and (running[0].has_ended() or not channel.poll())
            message = None if ready else channel.recv()
        except (EOFError, OSError):
            return True
        try:
            if message is None:
                output = running.popleft().wait()
                if output is not None and answers:
                    channel.send(output)
            elif isinstance(message, StepInput):
                running.append(worker.launch(message))
            elif isinstance(message, Call):
                channel.send(Reply(getattr(worker, message.method)(*message.arguments)))
            elif isinstance(message, Published):
                assert publish is not None
                publish(message)
            else:
                assert isinstance(message, Stop)
                return True
        except Exception as error:
            with suppress(OSError):  # the driver is gone
                # A request was checked before it came into a step: what fails in a step is no user's mistake.
                in_step = message is None or isinstance(message, StepInput)
                channel.send(Failure.of(error, for_user=not in_step))
            return False


def join_ranks(config: InferenceConfig, place: RankPlace, store: dist.Store | None, device: torch.device) -> None:
    """Makes this process one rank of several: its share of the cores, and the process group unless it stands.

    store: where own ranks meet; None under torchrun.
    """
    if device.type == "cpu":
        divide_threads(place.local_world_size)
    else:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        init_process_group(place, device, config.collective_timeout_s, store)


def make_worker(config: InferenceConfig, device: torch.device) -> Worker:
    """A worker with its mesh, for this process alone or for one of the ranks that have joined."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = None if config.world_size == 1 else choose_backend(gpu_of(device), config.collective_timeout_s)
    mesh = ProcessGroupMesh(
        dp=config.dp_size,
        pp=config.pp_size,
        tp=config.tp_size,
        backend=backend,
        timeout_s=config.collective_timeout_s,
        staged=device.type == "cuda" and backend == "gloo",
    )
    for axis in ("tp", "pp"):
        Communicator.along(mesh, axis)  # creating groups is collective: all of them here, in one order
    return Worker(config, mesh, device)


def run_own_rank(connection: Connection, place: RankPlace, store: dist.Store) -> int:
    """A rank that the engine started: its first message says what to be. Returns the process's exit code."""
    config, device, offer = connection.recv()
    channel = Channel(connection)
    join_ranks(config, place, store, torch.device(device))
    worker = make_worker(config, torch.device(device))
    accepted = channel.accept(offer, place.is_crowded)
    connection.send(Reply(accepted))
    return 0 if serve(channel, worker) else 1
