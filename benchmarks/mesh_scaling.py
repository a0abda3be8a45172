"""Two ranks of one thread each beside one rank of two threads: what a mesh costs on one host.

Each round decodes on every mesh in turn, `batch` sequences at once, and the ratio to one rank is that of the same
round. A window begins when every prompt is computed and nothing is in flight, and ends with the last step, so that all
sequences live as long as it. `busy` is the share of it in which a rank computed or waited for a rank of its layer; the
rest is what the driver took, and the waits for another stage.

Then the collectives of one token's hidden state between two ranks, each on a core of its own: through shared memory,
and by gloo beside it in the same run, in microseconds. A send and receive is half of there and back.

Medians over rounds. Exit code 1 if a target is missed.

    python benchmarks/mesh_scaling.py
    python benchmarks/mesh_scaling.py --dtype bfloat16 --mesh tp2 --batch 1 --json
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import format_table, heading, where_and_when

from meshlm import Communicator, InferenceConfig, InferenceEngine, ProcessGroupMesh, SamplingParams
from meshlm.mesh.launch import RankPlace, init_process_group
from meshlm.mesh.own_ranks import RankProcesses
from meshlm.serving.demo_model import demo_model_path

ONE = "one rank"
MESHES = {"tp2": {"tp_size": 2}, "pp2": {"pp_size": 2}, "dp2": {"dp_size": 2}}
TARGETS = {("tp2", 1): 0.95, ("tp2", 32): 0.9, ("pp2", 32): 0.95, ("dp2", 32): 0.95}  # times one rank
ALL_REDUCE_US = 30.0
PROMPT_TOKENS = 32
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """One measured window."""

    tokens_per_s: float
    busy: list[float]  # share of the window, by rank


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--mesh", nargs="*", choices=MESHES, default=list(MESHES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--new-tokens", type=int, default=128, help="of one sequence; of each in a batch 64 at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-collectives", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    model, where = args.model or str(demo_model_path()), where_and_when(CPU)
    if not args.json:
        print("\n".join(heading(where)), flush=True)
    decodes, costs = [], []
    for dtype in args.dtype:
        decodes += decode_all(model, dtype, args.mesh, args.batch, args.new_tokens, args.rounds)
        if not args.no_collectives:
            costs += collectives(dtype, args.rounds)
    missed = misses(decodes, costs)
    if args.json:
        targets = {f"{mesh} {batch}": ratio for (mesh, batch), ratio in TARGETS.items()}
        figures = {"targets": {**targets, "all_reduce_us": ALL_REDUCE_US}, "met": not missed}
        print(json.dumps({**where, **figures, "decode": decodes, "collectives": costs}, indent=2))
    else:
        print("\n".join(table(decodes, costs)))
    for miss in missed:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if missed else 0


# ---- decoding --------------------------------------------------------------------------------------------------------


def decode_all(
    model: str, dtype: str, meshes: list[str], batches: list[int], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """A result for each mesh and batch; all engines stand throughout, and one works at a time."""
    engines = {name: new_engine(model, dtype, sizes) for name, sizes in {ONE: {}, **pick(MESHES, meshes)}.items()}
    results = []
    try:
        for batch in batches:
            tokens = new_tokens if batch == 1 else min(64, new_tokens)
            runs: dict[str, list[Run]] = {name: [] for name in engines}
            for round_ in range(rounds + 1):
                for name, engine in engines.items():
                    run = decode(engine, batch, tokens if round_ else 8)
                    if round_:  # the first round warms up
                        runs[name].append(run)
            for name in engines:
                pairs = zip(runs[name], runs[ONE], strict=True)
                middle = sorted(runs[name], key=lambda run: run.tokens_per_s)[len(runs[name]) // 2]
                ratio = statistics.median(mine.tokens_per_s / one.tokens_per_s for mine, one in pairs)
                results.append({"mesh": name, "batch": batch, "dtype": dtype, "ratio": ratio, **asdict(middle)})
    finally:
        for engine in engines.values():
            engine.close()
    return results


def pick(table: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: table[name] for name in names}


def new_engine(model: str, dtype: str, sizes: dict[str, int]) -> InferenceEngine:
    return InferenceEngine(model, InferenceConfig(dtype=dtype, enable_prefix_caching=False, **sizes))


def decode(engine: InferenceEngine, batch: int, new_tokens: int) -> Run:
    params = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False)
    for index in range(batch):
        engine.add_request([1000 + index] * PROMPT_TOKENS, params)
    started: set[str] = set()
    while len(started) < batch:  # the first token of each: all prompts are computed
        started |= {output.request_id for output in engine.step()}
    before, tokens = engine.busy(), engine.stats().num_output_tokens  # nothing is in flight
    begin = time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    elapsed = time.perf_counter() - begin
    busy = [new["busy_s"] - old["busy_s"] for new, old in zip(engine.busy(), before, strict=True)]
    generated = engine.stats().num_output_tokens - tokens
    return Run(tokens_per_s=generated / elapsed, busy=[seconds / elapsed for seconds in busy])


# ---- collectives -----------------------------------------------------------------------------------------------------


def collectives(dtype: str, rounds: int) -> list[dict[str, Any]]:
    """A result for each operation on one token's hidden state."""
    target = f"{Path(__file__).stem}:run_rank"
    processes = RankProcesses(2, target, lambda rank: f"rank {rank}")
    try:
        for connection in processes.connections:
            connection.send((dtype, rounds))
        try:
            measured, _ = (connection.recv() for connection in processes.connections)
        except EOFError:
            raise processes.failure(0) from None
    finally:
        processes.close()
    if isinstance(measured, dict):
        return [{"operation": name, "dtype": dtype, **each} for name, each in measured.items()]
    raise processes.failure(0, measured.traceback)


def run_rank(connection: Connection, place: RankPlace, store: dist.Store) -> int:
    """One of the two ranks; sends the medians in microseconds, {operation: {what it goes by: figure}}."""
    dtype, rounds = connection.recv()
    torch.set_num_threads(1)
    init_process_group(place, CPU, 60.0, store)
    mesh = ProcessGroupMesh(tp=2, backend="gloo", timeout_s=60.0)
    shared = Communicator.along(mesh, "tp")
    forms = {shared.bound: shared, "gloo": Communicator(mesh.get_group("tp"), "tp", 60.0)}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[place.rank]})  # this thread, not those that gloo has by now
    hidden = torch.zeros(1, 576, dtype=getattr(torch, dtype))
    results: dict[str, dict[str, float]] = {}
    for name, (operation, parts) in OPERATIONS.items():
        times: dict[str, list[float]] = {form: [] for form in forms}
        for round_ in range(rounds + 1):
            for form, communicator in forms.items():
                count = 200 if form == "gloo" else 5000
                communicator.barrier()
                begin = time.perf_counter()
                for _ in range(count):
                    operation(communicator, hidden)
                if round_:  # the first round warms up
                    times[form].append((time.perf_counter() - begin) / count / parts * 1e6)
        results[name] = {form: statistics.median(values) for form, values in times.items()}
    connection.send(results)
    connection.poll(None)  # what it is ended by
    return 0


def there_and_back(communicator: Communicator, hidden: torch.Tensor) -> None:
    for src in (0, 1):
        if communicator.rank == src:
            communicator.send(hidden, 1 - src)
        else:
            communicator.recv(hidden, src)


# With how many parts a call has, of which one is what the figure is of.
OPERATIONS: dict[str, tuple[Callable[[Communicator, torch.Tensor], Any], int]] = {
    "all-reduce": (lambda communicator, hidden: communicator.all_reduce(hidden), 1),
    "all-gather": (lambda communicator, hidden: communicator.all_gather(hidden), 1),
    "broadcast": (lambda communicator, hidden: communicator.broadcast(hidden, 0), 1),
    "send/recv": (there_and_back, 2),
    "barrier": (lambda communicator, hidden: communicator.barrier(), 1),
}


# ---- what comes out --------------------------------------------------------------------------------------------------


def misses(decodes: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[str]:
    missed = []
    for result in decodes:
        mesh, batch, ratio = result["mesh"], result["batch"], result["ratio"]
        target = TARGETS.get((mesh, batch), 0.0)
        if ratio < target:
            missed.append(f"{mesh} {result['dtype']}, batch {batch}: {ratio:.2f} times one rank, target {target}")
    for cost in costs:
        us = cost.get("shared memory", float("inf"))
        if cost["operation"] == "all-reduce" and us > ALL_REDUCE_US:
            missed.append(f"all-reduce {cost['dtype']}: {us:.1f} µs, target {ALL_REDUCE_US:.0f}")
    return missed


def table(decodes: list[dict[str, Any]], costs: list[dict[str, Any]]) -> list[str]:
    rows = []
    for result in decodes:
        target = TARGETS.get((result["mesh"], result["batch"]))
        verdict = "" if target is None else f"{target} {'ok' if result['ratio'] >= target else 'MISSED'}"
        busy = " ".join(f"{share:.0%}" for share in result["busy"])
        figures = [f"{result['tokens_per_s']:.1f} tokens/s", f"{result['ratio']:.2f} x", busy, verdict]
        rows.append([f"{result['mesh']}, batch {result['batch']}", result["dtype"], *figures])
    for cost in costs:
        us, gloo = cost.get("shared memory"), cost["gloo"]
        verdict = ""
        if cost["operation"] == "all-reduce":
            verdict = f"{ALL_REDUCE_US:.0f} µs {'ok' if us is not None and us <= ALL_REDUCE_US else 'MISSED'}"
        figures = ["-" if us is None else f"{us:.1f} µs", f"gloo {gloo:.0f} µs", "", verdict]
        rows.append([cost["operation"], cost["dtype"], *figures])
    return format_table(["", "dtype", "", "to one rank", "busy", "target"], rows, 2)


if __name__ == "__main__":
    sys.exit(main())
