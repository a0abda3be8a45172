"""What a decode step costs beside the model's own ops, on one rank.

A step of `--batch` requests is divided into the stage's forward with its head, and the rest: scheduling, laying out,
drawing, bookkeeping, text. Each kind of drawing runs `--rounds` times, in turn; the table gives medians over the steps
of all rounds. Prompts are text, end tokens are ignored. Exit code 1 if the rest misses its target.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --dtype float32 --batch 8 --json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import transformers

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.serving.demo_model import demo_model_path

TARGET_MS = 1.5
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 0.8, "top_k": 40},
}
PROMPTS = ["Once upon a time", "The capital of France is", "A list of fruits: apple,", "In the year 1900 the city of"]
_WARM_UP = 8  # steps of each run that are not counted, the first of which computes the prompts


class Timers:
    """Seconds spent in methods of objects, by label, since they were last taken."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def watch(self, owner: Any, method: str, label: str) -> None:
        setattr(owner, method, self.timed(label, getattr(owner, method)))

    def timed(self, label: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self._seconds[label] += time.perf_counter() - started

        return timed

    def take(self) -> dict[str, float]:
        taken = dict(self._seconds)
        self._seconds.clear()
        return taken


class Steps:
    """An engine whose steps are timed."""

    def __init__(self, model: str, dtype: str, batch: int) -> None:
        self.batch = batch
        self.engine = InferenceEngine(model, InferenceConfig(dtype=dtype, max_num_seqs=batch))
        core, runner = self.engine._core, self.engine._world.executor.worker.runner  # type: ignore[attr-defined]
        scheduler = core.replicas[0].scheduler
        self._timers = timers = Timers()
        timers.watch(runner, "_forward", "forward")
        timers.watch(runner, "_replay", "forward")
        head_of = runner._head
        runner._head = lambda step, size: timers.timed("head", head_of(step, size))
        timers.watch(runner, "_draw", "head and drawing")
        timers.watch(runner, "launch", "launch")
        timers.watch(core, "_collect", "collect")
        timers.watch(scheduler, "schedule", "schedule")
        timers.watch(scheduler, "update", "update and text")

    def run(self, draw: dict[str, Any], num_steps: int) -> list[dict[str, float]]:
        """Milliseconds of each step, in parts."""
        engine, rows = self.engine, []
        params = SamplingParams(max_tokens=num_steps + _WARM_UP, ignore_eos=True, seed=0, **draw)
        for index in range(self.batch):
            engine.add_request(PROMPTS[index % len(PROMPTS)], params)
        while engine.has_unfinished():
            self._timers.take()
            started = time.perf_counter()
            engine.step()
            rows.append(_parts(time.perf_counter() - started, self._timers.take()))
        return rows[_WARM_UP:-1]


def _parts(total: float, seconds: dict[str, float]) -> dict[str, float]:
    model = seconds["forward"] + seconds["head"]
    drawing = seconds["head and drawing"] - seconds["head"]
    parts = {
        "step": total,
        "model": model,
        "rest": total - model,
        "schedule": seconds["schedule"],
        "layout": seconds["launch"] - model - drawing,
        "drawing": drawing,
        "redrawing": seconds["collect"] - seconds["launch"] - seconds["update and text"],
        "update": seconds["update and text"],
        "outputs": total - seconds["collect"] - seconds["schedule"],
    }
    return {name: 1e3 * value for name, value in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory with a tokenizer (default: the demo model)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    model = args.model or str(demo_model_path())
    results, missed = [], []
    for dtype in args.dtype:
        steps = Steps(model, dtype, args.batch)
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in args.draw}
        for _ in range(args.rounds):
            for name in args.draw:
                rows[name] += steps.run(DRAWS[name], args.steps)
        steps.engine.close()
        for name, found in rows.items():
            medians = {part: statistics.median(row[part] for row in found) for part in found[0]}
            results.append({"dtype": dtype, "draw": name, "batch": args.batch, "ms": medians})
            if medians["rest"] > TARGET_MS:
                missed.append(f"{dtype}, {name}: {medians['rest']:.2f} ms beside the model, target {TARGET_MS}")
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        figures = {"versions": versions, "target_ms": TARGET_MS, "met": not missed, "results": results}
        print(json.dumps(figures, indent=2))
    else:
        print(f"{model}, batch {args.batch}; {torch.get_num_threads()} threads; {platform.machine()}; ms a step")
        names = list(results[0]["ms"])
        print(f"{'':21}" + "".join(f"{name:>10}" for name in names))
        for result in results:
            label = f"{result['dtype']} {result['draw']}"
            print(f"{label:21}" + "".join(f"{result['ms'][name]:10.3f}" for name in names))
    for miss in missed:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
