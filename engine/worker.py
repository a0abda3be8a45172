"""What one rank does: load its stage, allocate its cache, capture graphs, launch steps.

`Worker` is the same object in all three worlds. `rank.py` runs it behind a connection; in a world of one rank the
driver calls it directly.
"""

import os
import socket
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from ..config import ConfigError, InferenceConfig
from ..kernels import select_ops
from ..mesh.collectives import Communicator
from ..mesh.process_group_mesh import ProcessGroupMesh
from ..policies import Dim
from ..shardformer import Checkpoint, InferenceShardformer
from ..shardformer.backends import AttentionBackend, Bound, describe_bound
from ..shardformer.base import Stage
from ..shardformer.rebinding import bind, try_backend
from ..shardformer.shardformer import max_model_len, workload_of
from .cuda_graphs import CudaCapture, DecodeGraphs, ladder, rerun
from .draft_model import draft_config
from .drawing import Drawing
from .kv_cache import KVCache, available_bytes, block_bytes, peak_rss_bytes, rss_bytes
from .model_runner import ModelRunner, RunningStep
from .rank_info import DraftInfo, RankInfo
from .spinning import spin_guard
from .step import MAX_DRAFTS, SampleRequest, SampleSettings, StepInput
from .step_tapes import LARGEST, StepTapes


class Worker:
    """One rank's part of the engine. mesh: axes dp, pp, tp."""

    def __init__(self, config: InferenceConfig, mesh: ProcessGroupMesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.checkpoint: Checkpoint | None = None  # what `load` takes if the driver sends none
        self._spin_guard = spin_guard() if device.type == "cpu" else None
        self.runner: ModelRunner | None = None
        self.draft: ModelRunner | None = None  # of a smaller model
        self._tried_draft: ModelRunner | None = None  # what `try_draft` made ready
        self._bound_as = config.attention_backend
        self._asked, self._candidates = "", list[AttentionBackend]()  # what `try_backend` made ready
        self._longest = 0  # tokens of a sequence
        self._free_before_graphs = 0
        self._beside_cache = 0  # bytes that steps and graphs take

    def load(self, checkpoint: Checkpoint | None = None) -> RankInfo:
        """Builds this rank's stage and reads its weights."""
        checkpoint, self.checkpoint = checkpoint or self.checkpoint, None
        assert checkpoint is not None
        started, baseline = time.monotonic(), rss_bytes()
        shardformer = InferenceShardformer(self.config, self.mesh, self.device)
        self.stage = stage = shardformer.optimize(checkpoint)
        bound = stage.backends.values()
        preferred = max(b.tuning.block_size if b.tuning else b.preferred_block_size for b in bound)
        self.block_size = block_size = self.config.block_size or preferred
        tp, pp = shardformer.tp, Communicator.along(self.mesh, "pp")
        shards = shardformer.shards(checkpoint.spec)
        vocabulary = [shards.range(Dim.VOCABULARY, checkpoint.spec.vocab_size, rank) for rank in range(tp.size)]
        ops = select_ops(self.device, stage.dtype)
        self._longest, num_seqs = max_model_len(self.config, checkpoint.spec), self.config.max_num_seqs
        drawing = None
        if stage.is_last:
            drawing = Drawing(tp, vocabulary, ops, self.device, num_slots=num_seqs, longest=self._longest)
        most = num_seqs + self.config.max_num_batched_tokens  # samples: of every token, and of siblings
        loops = self.device.type == "cpu" and self.config.async_scheduling is not False
        self.runner = ModelRunner(stage, block_size, pp, drawing, most, loops)
        self._check_graphs()
        beside_cache = self._activation_bytes()
        graph_sizes = self.graph_sizes()
        graph_bytes = self._estimate_graph_bytes(self.runner, graph_sizes)
        self._beside_cache = beside_cache = beside_cache + graph_bytes
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
            available_bytes=available_bytes(self.device) - beside_cache,
            block_size=block_size,
            block_bytes=block_bytes(stage, block_size),
            graph_sizes=graph_sizes,
            graph_bytes=graph_bytes,
            attention=self._bound(self._bound_as),
            ops=ops.name,
            collectives=", ".join(f"{axis.name} by {axis.bound}" for axis in (tp, pp) if axis.size > 1),
        )

    def _activation_bytes(self) -> int:
        """What the largest step takes beside weights and cache; measured on a GPU, with a step of zeros.

        On a CPU it is small beside what is left free, and it would cost a prefill at each start.
        """
        if self.device.type != "cuda":
            return 0
        config = self.config
        num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        query_lens, spare = [], config.max_num_batched_tokens - num_seqs  # the first are long; all draw, and drafts do
        for _ in range(num_seqs):
            query_lens.append(min(1 + spare, self._longest))
            spare -= query_lens[-1] - 1
        self.allocate(-(-query_lens[0] // self.block_size))  # for all, since it is only the memory that matters
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        ends = [stop - 1 for stop in accumulate(query_lens)]
        rows = [*ends, *range(min(MAX_DRAFTS, config.max_num_batched_tokens - num_seqs))]
        settings = SampleSettings(seed=0, temperature=1.0, top_k=0, top_p=0.9, min_p=0.0)
        samples = tuple(SampleRequest(row, position=1, settings=settings) for row in rows)
        tables = tuple(array("i", range(-(-count // self.block_size))) for count in query_lens)
        token_ids = array("q", bytes(8 * sum(query_lens)))
        self.launch(StepInput(0, token_ids, tuple(query_lens), (0,) * num_seqs, tables, samples)).wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def allocate(self, num_blocks: int) -> None:
        """Allocates the KV cache; from here on `launch` works."""
        runner = self.runner
        assert runner is not None
        if runner.cache is not None:
            runner.cache.let_go()
        runner.cache = cache = KVCache(self.stage, num_blocks, self.block_size)
        runner.graphs = self._new_tapes(runner)
        cache.touch_ahead(runner.busy.idle_s)

    # ---- a draft model ------------------------------------------------------------------------------------------

    def try_draft(self, checkpoint: Checkpoint) -> DraftInfo | str:
        """Builds this rank's stage of a draft model and reads its weights, for `bind_draft`; the reason if that fails.

        It draws as the target does, from the same histories. Its steps take less than the target's largest.
        """
        runner = self.runner
        assert runner is not None
        config = draft_config(self.config, checkpoint.spec, self.block_size)
        try:
            stage = InferenceShardformer(config, self.mesh, self.device).optimize(checkpoint)
            KVCache(stage, 1, self.block_size)
            draft = ModelRunner(stage, self.block_size, runner.pp, runner.drawing, runner.max_num_samples)
            sizes = () if self._why_no_graphs(stage) else self.graph_sizes()
            graph_bytes = self._estimate_graph_bytes(draft, sizes)
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return kind + " ".join(str(error).split())
        draft.busy, self._tried_draft = runner.busy, draft
        return DraftInfo(
            architecture=checkpoint.spec.architecture,
            weight_bytes=stage.weight_bytes,
            block_bytes=block_bytes(stage, self.block_size),
            has_graphs=bool(sizes),
            available_bytes=available_bytes(self.device) - self._beside_cache - graph_bytes,
        )

    def forget_draft(self) -> None:
        """Frees what `try_draft` has made ready."""
        _free(self._tried_draft)
        self._tried_draft = None
        self._free_bytes()

    def bind_draft(self, num_blocks: int) -> str | None:
        """Takes the draft model that `try_draft` has made ready, or none, and frees the one before; allocates its KV
        cache, under the same block ids as the target's. The reason if that fails: then there is none."""
        runner, draft = self.runner, self._tried_draft
        assert runner is not None
        _free(self.draft)
        self.draft = self._tried_draft = None
        runner.stages = [self.stage]
        self._free_bytes()
        if draft is None:
            return None
        try:
            draft.cache = KVCache(draft.stage, num_blocks, self.block_size)
        except (RuntimeError, MemoryError) as error:
            _free(draft)
            return f"no memory for the draft model's KV cache of {num_blocks} blocks: {' '.join(str(error).split())}"
        self.draft = draft
        draft.graphs = self._new_tapes(draft)
        draft.stages = runner.stages = [self.stage, draft.stage]
        return None

    # ---- CUDA graphs --------------------------------------------------------------------------------------------

    def _why_no_graphs(self, stage: Stage) -> list[str]:
        """Every reason why a stage's steps cannot run from graphs on this rank."""
        tp = Communicator.along(self.mesh, "tp")
        reasons = [
            f"attention_backend={backend.name!r} cannot be captured"
            for backend in stage.backends.values()
            if not backend.supports_graphs
        ]
        if not stage.supports_graphs:
            reasons.append("the layers of the generic policy are transformers' own, and may wait for the device")
        if tp.size > 1 and not tp.in_graphs:
            reasons.append(f"the {tp.size} ranks of a layer share {self.device} and sum over the CPU")
        return reasons

    def _check_graphs(self) -> None:
        """Raises ConfigError if they are asked for and cannot be."""
        if self.config.cuda_graphs and (reasons := self._why_no_graphs(self.stage)):
            raise ConfigError(f"InferenceConfig.cuda_graphs: True cannot be here: {'; '.join(reasons)}")

    def graph_sizes(self) -> tuple[int, ...]:
        """Batch sizes to be captured, the largest first; none where graphs are off or cannot be."""
        config = self.config
        is_on = self.device.type == "cuda" if config.cuda_graphs is None else config.cuda_graphs
        if not is_on or self._why_no_graphs(self.stage):
            return ()
        return ladder(min(config.max_num_seqs, config.max_num_batched_tokens))

    def _new_graphs(self, runner: ModelRunner, largest: int, longest: int) -> DecodeGraphs:
        capture = CudaCapture(self.device) if self.device.type == "cuda" else rerun
        return DecodeGraphs(runner.stage, largest, longest, self.block_size, runner.max_num_samples, capture)

    def _new_tapes(self, runner: ModelRunner) -> StepTapes | None:
        """What graphs are on a CPU, unless they are asked for or refused by name."""
        tp = Communicator.along(self.mesh, "tp")
        if self.device.type != "cpu" or self.config.cuda_graphs is not None:
            return None
        are_able = runner.stage.supports_graphs and all(b.supports_tapes for b in runner.stage.backends.values())
        if not are_able or not tp.on_tape:
            return None
        largest = min(self.config.max_num_seqs, LARGEST)
        return StepTapes(runner.stage, largest, self._longest, self.block_size, tp)

    def _estimate_graph_bytes(self, runner: ModelRunner, sizes: Sequence[int]) -> int:
        """What graphs of these sizes will take; measured on the largest two, since all share one pool and each has a
        little of its own. On a CPU nothing is captured."""
        if self.device.type != "cuda":
            return 0
        graphs, free = None, [self._free_bytes()]
        for size in sizes[:2]:
            graphs = graphs or self._new_graphs(runner, size, self._longest)
            graphs.record(size)
            free.append(self._free_bytes())
        del graphs
        KVCache(runner.stage, 0, self.block_size)  # what has been enough for this
        torch.cuda.empty_cache()
        taken = [max(0, before - after) for before, after in pairwise(free)]
        return sum(taken) + (len(sizes) - len(taken)) * taken[-1] if taken else 0

    def _free_bytes(self) -> int:
        """On a GPU, with nothing of this process's held back; what graphs hold is not free to others."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def begin_graphs(self, model: int, largest: int, longest: int) -> None:
        """Makes ready for `capture`. model: as in `StepInput`; largest: batch; longest: tokens of a sequence."""
        runner = self._runner(model)
        if model == 0:
            self._free_before_graphs = self._free_bytes()
        runner.graphs = self._new_graphs(runner, largest, longest)

    def capture(self, model: int, size: int) -> str | None:
        """Captures the decode step of a batch size; the larger come first. Gives the reason if that fails."""
        graphs = self._runner(model).graphs
        assert isinstance(graphs, DecodeGraphs)
        try:
            graphs.record(size)
        except Exception as error:
            return (
                f"a step of {size} sequences could not be captured as a CUDA graph; cuda_graphs=False does without: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
        return None

    def graph_bytes(self) -> int:
        """What the graphs take that were captured since `begin_graphs`."""
        return max(0, self._free_before_graphs - self._free_bytes())

    # ---- attention backends -------------------------------------------------------------------------------------

    def try_backend(self, name: str) -> str | None:
        """Makes ready another attention backend for `bind_backend`; the reason if it cannot serve on this rank."""
        assert self.runner is not None
        try:
            workload = replace(workload_of(self.config, self.stage.spec), block_size=self.block_size)
            self._candidates = try_backend(self.stage, name, self.block_size, self.runner.last_sequences, workload)
            self._asked = name
        except ValueError as reason:
            return str(reason)
        except Exception as error:  # a kernel that does not compile, or does not fit on the device, has many
            return f"attention_backend={name!r} failed when it was tried: {type(error).__name__}: " + " ".join(
                str(error).split()
            )
        return None

    def bind_backend(self) -> dict[str, Any]:
        """Takes what `try_backend` made ready, and lets graphs go, which have the old one in them; gives what this
        changes in `RankInfo`. Called again, it takes back the old one."""
        assert self.runner is not None
        self.runner.graphs = None
        former = [attention.backend for attention in self.stage.attentions]
        bind(self.stage, self._candidates)
        self._candidates, (self._asked, self._bound_as) = former, (self._bound_as, self._asked)
        self.runner.backends = self.stage.backends
        self.runner.graphs = self._new_tapes(self.runner)
        return {"attention": self._bound(self._bound_as), "graph_sizes": self.graph_sizes(), "graph_bytes": 0}

    def _bound(self, asked: str) -> tuple[Bound, ...]:
        backends = (attention.backend for attention in self.stage.attentions)
        return describe_bound(asked, backends, self.stage.layer_range[0])

    # ---- steps --------------------------------------------------------------------------------------------------

    def launch(self, step: StepInput) -> RunningStep:
        """Begins with a step; those that were begun are waited for in their order."""
        if self._spin_guard is not None:
            self._spin_guard.look()
        return self._runner(step.model).launch(step)

    def _runner(self, model: int) -> ModelRunner:
        runner = self.draft if model else self.runner
        assert runner is not None
        return runner

    def let_go(self) -> None:
        """Breaks the circles that would keep weights, cache and graphs alive, and NCCL waiting for the graphs."""
        if self._spin_guard is not None:
            self._spin_guard.let_go()
        for runner in (self.draft, self.runner):
            _free(runner)

    def busy(self) -> dict[str, float]:
        """This rank's steps and seconds of computing so far, and when they began and ended."""
        assert self.runner is not None
        return asdict(self.runner.busy)


def _free(runner: ModelRunner | None) -> None:
    if runner is not None:
        runner.let_go()
        runner.stage.let_go()
