"""What does choosing the implementation once, as a layer is built, save against choosing in every forward?

Three engines decode the same requests, step by step in turn; they differ in how an attention layer finds its backend:

    bound       an object that the layer was given when it was built: what MeshLM does
    looked up   in every forward, by name in a table of backends that exist already
    chosen      in every forward, as `auto` does it: each backend in turn is asked whether it can serve the layer

The figures are medians over the steps of one token for each request; `saved` is that of the ratios step by step.
`alone` is what a step's choices take when they are timed by themselves, and their share of a bound step: on a machine
that does other things as well it tells more than the difference of two steps.

    python benchmarks/binding.py
    python benchmarks/binding.py --num-seqs 1 8 --dtype float32 --json
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from meshlm import InferenceConfig, SamplingParams
from meshlm.engine.engine import InferenceEngine
from meshlm.serving.demo_model import demo_model_path
from meshlm.shardformer.attention import PagedAttention
from meshlm.shardformer.backends import AttentionBackend, auto_backend
from meshlm.shardformer.stage import PipelineStage

PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One batch size."""

    dtype: str
    num_seqs: int
    bound_ms: float  # a step
    looked_up_ms: float
    chosen_ms: float
    looked_up_saved: float  # share of the step that binding saves
    chosen_saved: float
    alone_ms: float  # choosing as often as a step does, without the step


class LookedUp:
    """Finds the backend by its name, in every forward."""

    def __init__(self, bound: AttentionBackend) -> None:
        self.name, self.spec, self.prepare, self.plan_key = bound.name, bound.spec, bound.prepare, bound.plan_key
        self.preferred_block_size = bound.preferred_block_size
        self.table = {bound.name: bound}

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return self.table[self.name].forward(query, key_cache, value_cache, plan, sinks)


class Chosen(LookedUp):
    """Asks each backend whether it can serve, in every forward."""

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return self.table[auto_backend(self.spec)].forward(query, key_cache, value_cache, plan, sinks)


WAYS: dict[str, Any] = {"bound": lambda bound: bound, "looked up": LookedUp, "chosen": Chosen}


def stage_of(engine: InferenceEngine) -> PipelineStage:
    """The one stage of an engine that runs in this process."""
    return engine._world.executor.worker.stage  # type: ignore[attr-defined,no-any-return]


def measure(model: Any, dtype: str, num_seqs: int, num_steps: int) -> Row:
    engines, specs = {}, []
    for way, wrap in WAYS.items():
        engine = engines[way] = InferenceEngine(
            model, InferenceConfig(dtype=dtype, num_kv_blocks=64 * num_seqs, cuda_graphs=False)
        )
        for module in stage_of(engine).modules():
            if isinstance(module, PagedAttention):
                if way == "bound":
                    specs.append(module.backend.spec)
                module.backend = wrap(module.backend)
        params = SamplingParams(temperature=0.0, max_tokens=num_steps + 10, ignore_eos=True, detokenize=False)
        generator = torch.Generator().manual_seed(0)
        for _ in range(num_seqs):
            engine.add_request(torch.randint(100, 1000, (PROMPT_TOKENS,), generator=generator).tolist(), params)
        for _ in range(5):
            engine.step()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    for _ in range(num_steps):
        for way in order:
            started = time.perf_counter()
            engines[way].step()
            times[way].append(time.perf_counter() - started)
        order.append(order.pop(0))  # whoever comes first finds the caches as the last one left them
    for engine in engines.values():
        engine.close()
    alone = []
    for _ in range(num_steps):
        started = time.perf_counter()
        for spec in specs:
            auto_backend(spec)
        alone.append(time.perf_counter() - started)

    def saved(way: str) -> float:
        return statistics.median(1 - ours / theirs for ours, theirs in zip(times["bound"], times[way], strict=True))

    median = {way: statistics.median(values) * 1e3 for way, values in times.items()}
    return Row(dtype, num_seqs, *median.values(), saved("looked up"), saved("chosen"), statistics.median(alone) * 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: the demo model")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = args.model or demo_model_path()
    rows = [measure(model, dtype, num_seqs, args.num_steps) for dtype in args.dtype for num_seqs in args.num_seqs]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
    print("dtype     sequences   bound ms   looked up ms   saved   chosen ms   saved   alone ms   share")
    for row in rows:
        print(
            f"{row.dtype:<9} {row.num_seqs:9}   {row.bound_ms:8.2f}   {row.looked_up_ms:12.2f}   "
            f"{row.looked_up_saved:5.1%}   {row.chosen_ms:9.2f}   {row.chosen_saved:5.1%}   "
            f"{row.alone_ms:8.2f}   {row.alone_ms / row.bound_ms:5.1%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
