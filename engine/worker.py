"""What one rank does: load its stage, allocate its cache, execute steps, answer the driver.

`Worker` is the same object in all three worlds. `serve` runs it behind a connection; in a world of one rank the
driver calls it directly.
"""

import os
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from ..config import InferenceConfig
from ..kernels import select_ops
from ..mesh.collectives import Communicator
from ..mesh.launch import Failure, RankPlace, choose_backend, divide_threads, gpu_of, init_process_group
from ..mesh.process_group_mesh import ProcessGroupMesh
from ..policies import Dim
from ..shardformer import Checkpoint, InferenceShardformer
from ..shardformer.backends import AttentionBackend
from ..shardformer.rebinding import bind, try_backend
from ..shardformer.shardformer import max_model_len
from .kv_cache import KVCache, available_bytes, block_bytes, peak_rss_bytes, rss_bytes
from .model_runner import ModelRunner, RunningStep
from .sampler import Sampler
from .step import SampleRequest, StepInput


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


@dataclass(frozen=True)
class RankInfo:
    """What a rank holds."""

    rank: int
    coordinate: dict[str, int]
    host: str
    pid: int
    device: str
    dtype: str
    layers: tuple[int, int]  # (start, stop)
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    vocabulary: tuple[int, int]
    has_embedding: bool
    has_lm_head: bool
    num_threads: int
    weight_bytes: int
    bytes_read: int
    load_s: float
    baseline_rss_bytes: int  # resident before loading
    peak_rss_bytes: int
    available_bytes: int  # on its device, once the weights are there
    block_size: int
    block_bytes: int  # one block of the KV cache
    attention_backends: tuple[str, ...]
    ops: str

    def row(self, num_blocks: int, name_host: bool) -> dict[str, str]:
        """This rank as a row of a table: column -> cell."""

        def span(ends: tuple[int, int]) -> str:
            first, last = ends[0], ends[1] - 1
            return str(first) if first == last else f"{first}-{last}"

        threads = f"{self.num_threads} thread" + ("s" if self.num_threads > 1 else "")
        extra = (["embedding"] if self.has_embedding else []) + (["LM head"] if self.has_lm_head else [])
        return {
            "rank": str(self.rank),
            "(dp, pp, tp)": str(tuple(self.coordinate.values())),
            **({"host": self.host} if name_host else {}),
            "device": f"{self.device} ({threads})" if self.device == "cpu" else self.device,
            "layers": span(self.layers),
            "query heads": span(self.query_heads),
            "KV heads": span(self.kv_heads),
            "vocabulary": f"{span(self.vocabulary)} ({', '.join(extra)})" if extra else "",
            "weights": f"{self.weight_bytes / 2**20:.0f} MiB",
            "KV cache, up to": f"{self.block_bytes * num_blocks / 2**20:.0f} MiB",
        }


class Worker:
    """One rank's part of the engine. mesh: axes dp, pp, tp."""

    def __init__(self, config: InferenceConfig, mesh: ProcessGroupMesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.checkpoint: Checkpoint | None = None  # what `load` takes if the driver sends none
        self.runner: ModelRunner | None = None
        self._candidates: list[AttentionBackend] = []

    def load(self, checkpoint: Checkpoint | None = None) -> RankInfo:
        """Builds this rank's stage and reads its weights."""
        checkpoint, self.checkpoint = checkpoint or self.checkpoint, None
        assert checkpoint is not None
        started, baseline = time.monotonic(), rss_bytes()
        shardformer = InferenceShardformer(self.config, self.mesh, self.device)
        self.stage = stage = shardformer.optimize(checkpoint)
        preferred = max(backend.preferred_block_size for backend in stage.backends.values())
        self.block_size = block_size = self.config.block_size or preferred
        tp, pp = shardformer.tp, Communicator.along(self.mesh, "pp")
        shards = shardformer.shards(checkpoint.spec)
        vocabulary = [shards.range(Dim.VOCABULARY, rank) for rank in range(tp.size)]
        ops = select_ops(self.device, stage.dtype)
        sampler = Sampler(tp, vocabulary, ops, self.device) if stage.is_last else None
        self.runner = ModelRunner(stage, block_size, pp, sampler, self.config.max_num_seqs)
        activations = self._activation_bytes(max_model_len(self.config, checkpoint.spec))
        return RankInfo(
            rank=self.mesh.rank,
            coordinate=dict(zip(self.mesh.axis_names, self.mesh.coordinate(), strict=True)),
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(self.device),
            dtype=str(stage.dtype).removeprefix("torch."),
            layers=stage.layer_range,
            query_heads=shards.heads[tp.rank],
            kv_heads=shards.kv_heads[tp.rank],
            vocabulary=vocabulary[tp.rank],
            has_embedding=stage.is_first,
            has_lm_head=stage.is_last,
            num_threads=torch.get_num_threads(),
            weight_bytes=stage.weight_bytes,
            bytes_read=checkpoint.source.bytes_read,
            load_s=time.monotonic() - started,
            baseline_rss_bytes=baseline,
            peak_rss_bytes=peak_rss_bytes(),
            available_bytes=available_bytes(self.device) - activations,
            block_size=block_size,
            block_bytes=block_bytes(stage, block_size),
            attention_backends=tuple(stage.backends),
            ops=ops.name,
        )

    def _activation_bytes(self, max_model_len: int) -> int:
        """What the largest step takes beside weights and cache; measured on a GPU, with a step of zeros.

        On a CPU it is small beside what is left free, and it would cost a prefill at each start.
        """
        if self.device.type != "cuda":
            return 0
        count = min(self.config.max_num_batched_tokens, max_model_len)
        num_blocks = -(-count // self.block_size)
        self.allocate(num_blocks)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        sample = SampleRequest(sequence=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, key=(0, 0), banned=())
        table = array("i", range(num_blocks))
        self.launch(StepInput(0, array("q", bytes(8 * count)), (count,), (0,), (table,), (sample,))).wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def allocate(self, num_blocks: int) -> None:
        """Allocates the KV cache; from here on `execute` works."""
        KVCache(self.stage, num_blocks, self.block_size)

    def try_backend(self, name: str) -> str | None:
        """Makes ready another attention backend for `bind_backend`; the reason if it cannot serve on this rank."""
        assert self.runner is not None
        try:
            self._candidates = try_backend(self.stage, name, self.block_size, self.runner.last_sequences)
        except ValueError as reason:
            return str(reason)
        return None

    def bind_backend(self) -> tuple[str, ...]:
        """Takes what `try_backend` made ready; the names of what is bound now."""
        assert self.runner is not None
        bind(self.stage, self._candidates)
        self.runner.backends = self.stage.backends
        return tuple(self.stage.backends)

    def launch(self, step: StepInput) -> RunningStep:
        """Begins with a step; those that were begun are waited for in their order."""
        assert self.runner is not None
        return self.runner.launch(step)

    def busy(self) -> dict[str, float]:
        """This rank's steps and seconds of computing so far, and when they began and ended."""
        assert self.runner is not None
        return asdict(self.runner.busy)


def serve(connection: Connection, worker: Worker, publish: Callable[[Published], None] | None = None) -> bool:
    """Answers the driver until it says stop or goes away. A rank of the last stage, tp 0, answers for its replica.

    publish: takes what is not for the worker but for this rank's caller (under torchrun).
    Returns False if it failed; the driver was told.
    """
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)  # the current device is a thread's own
    answers = worker.mesh.coordinate("tp") == 0
    running: deque[RunningStep] = deque()
    while True:
        try:
            # What has come is begun with before anything is waited for: so a GPU always has something to do.
            ready = running and (running[0].has_ended() or not connection.poll())
            message = None if ready else connection.recv()
        except (EOFError, OSError):
            return True
        try:
            if message is None:
                output = running.popleft().wait()
                if output is not None and answers:
                    connection.send(output)
            elif isinstance(message, StepInput):
                running.append(worker.launch(message))
            elif isinstance(message, Call):
                connection.send(Reply(getattr(worker, message.method)(*message.arguments)))
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
                connection.send(Failure.of(error, for_user=not in_step))
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
    config, device = connection.recv()
    join_ranks(config, place, store, torch.device(device))
    worker = make_worker(config, torch.device(device))
    connection.send(Reply(socket.gethostname()))
    return 0 if serve(connection, worker) else 1
