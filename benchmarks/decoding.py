"""What does each feature of decoding cost, per step, beside plain greedy decoding of the same batch?

32 requests, 64 random tokens in. Two engines hold the same model and the same prompts: one decodes greedily, the other
with the feature. They take their steps in turn, the first of each pair in turn too, so that whatever else the machine
does falls on both; the prompts' own steps are not counted. From round to round the engines change their parts, since
one's weights may lie better in memory. `same` is greedy beside greedy: what the comparison errs.

    step    median milliseconds of a step with the feature
    greedy  of its pairs' greedy steps
    cost    mean over rounds (an even number) of the median over pairs of step / greedy, less 1

`structured` decodes a JSON schema that no output fulfils before the round ends; `siblings` is one request with n=32
sampled outputs; `processor` is a user's logits processor that changes nothing, which is called row by row and makes
the host wait. Exit code 1 if a feature costs more than its bound.

The clock is the wall's. On a machine that is not quiet, `--clock cpu` (this process's processor time, of all threads)
tells a percent apart with OMP_NUM_THREADS=1, where the two are the same but for what others take.

    python benchmarks/decoding.py
    OMP_NUM_THREADS=1 python benchmarks/decoding.py --clock cpu
    python benchmarks/decoding.py --feature penalties logprobs --dtype bfloat16 --rounds 8 --json
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from measuring import choose_device, format_table, heading, where_and_when

from meshlm import InferenceConfig, InferenceEngine
from meshlm.serving.demo_model import demo_model_path

PROMPT_TOKENS = 64
WARM_STEPS = 2  # once every prompt is computed
BOUND = 0.10
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "is_member": {"type": "boolean"}},
        "required": ["name", "age", "is_member"],
        "additionalProperties": False,
    },
}


@dataclass(frozen=True)
class Feature:
    """What the requests ask for, beside their lengths."""

    params: dict[str, Any] = field(default_factory=dict)
    bound: float | None = None  # of its cost
    siblings: bool = False  # one request with n outputs instead of n requests


FEATURES: dict[str, Feature] = {
    "same": Feature(),
    "penalties": Feature({"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}, BOUND),
    "no-repeat-ngram": Feature({"no_repeat_ngram_size": 3}),
    "logit-bias": Feature({"logit_bias": dict.fromkeys(range(300, 600), 2.0)}),
    "bad-words": Feature({"bad_words": [[i] for i in range(50)] + [[i, i + 1, i + 2] for i in range(300, 350)]}),
    "sampling": Feature({"temperature": 1.0}),
    "top-k top-p": Feature({"temperature": 1.0, "top_k": 50, "top_p": 0.9}, BOUND),
    "min-p": Feature({"temperature": 1.0, "min_p": 0.05}),
    "logprobs": Feature({"logprobs": 5}, BOUND),
    "structured": Feature({"structured_outputs": {"json": SCHEMA}}, BOUND),
    "siblings": Feature({"temperature": 1.0}, siblings=True),
    "processor": Feature({"logits_processors": [lambda prompt, output, logits: logits]}),
}


@dataclass(frozen=True)
class Row:
    feature: str
    dtype: str
    step_ms: float
    greedy_ms: float
    cost: float  # of the step, as a share of the greedy one
    bound: float | None

    @property
    def is_met(self) -> bool:
        return self.bound is None or self.cost <= self.bound


class Lane:
    """An engine that takes a batch step by step."""

    def __init__(self, model: Any, config: InferenceConfig, clock: Callable[[], float]) -> None:
        self.engine, self.clock = InferenceEngine(model, config), clock

    def begin(self, prompts: Sequence[Sequence[int]], feature: Feature, num_tokens: int) -> None:
        """Queues a batch, and steps until every output has its first tokens."""
        params = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, "detokenize": False}
        params |= feature.params
        if feature.siblings:
            prompts, params = prompts[:1], {**params, "n": len(prompts), "seed": 0}
        waiting = {self.engine.add_request(list(prompt), params) for prompt in prompts}
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.token_ids}
        for _ in range(WARM_STEPS):
            self.engine.step()

    def step(self) -> float:
        """Seconds."""
        started = self.clock()
        self.engine.step()
        return self.clock() - started

    def end(self) -> None:
        """Runs until no request is left."""
        while self.engine.has_unfinished():
            for output in self.engine.step():
                if not output.finished:
                    self.engine.abort(output.request_id)
                assert output.error is None and output.finish_reason in (None, "length", "abort"), output

    def close(self) -> None:
        self.engine.close()


def one_round(
    greedy: Lane, other: Lane, feature: Feature, prompts: Sequence[Sequence[int]], num_steps: int
) -> tuple[list[float], list[float]]:
    """Seconds of `num_steps` pairs of steps, greedy's first."""
    lanes, kinds, times = (greedy, other), (Feature(), feature), ([], [])
    for lane, kind in zip(lanes, kinds, strict=True):
        lane.begin(prompts, kind, num_tokens=len(prompts) + num_steps + WARM_STEPS)
    for pair in range(num_steps):
        for which in (0, 1) if pair % 2 else (1, 0):
            times[which].append(lanes[which].step())
    for lane in lanes:
        lane.end()
    return times


def measure(
    lanes: Sequence[Lane], dtype: str, features: Sequence[str], batch: int, rounds: int, num_steps: int
) -> list[Row]:
    """lanes: two, each of them greedy in every second round."""
    rows, rng = [], random.Random(0)
    prompts = [[rng.randrange(100) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]  # cached after the first round
    times: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in features}
    for round_ in range(rounds):
        greedy, other = lanes if round_ % 2 else reversed(lanes)
        for name in features:
            times[name].append(one_round(greedy, other, FEATURES[name], prompts, num_steps))
    for name in features:
        ratios = [statistics.median(b / a for a, b in zip(*pairs, strict=True)) for pairs in times[name]]
        greedy_s, step_s = (statistics.median(t for pairs in times[name] for t in pairs[which]) for which in (0, 1))
        rows.append(Row(name, dtype, 1e3 * step_s, 1e3 * greedy_s, statistics.mean(ratios) - 1, FEATURES[name].bound))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--feature", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps in each round")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    model = args.model or demo_model_path()
    settings = {"tp_size": args.tp_size, "pp_size": args.pp_size}
    rows = []
    for dtype in args.dtype:
        config = InferenceConfig(dtype=dtype, max_num_seqs=args.batch, max_model_len=512, **settings)
        lanes = [Lane(model, config, CLOCKS[args.clock]) for _ in range(2)]
        rows += measure(lanes, dtype, args.feature, args.batch, args.rounds, args.steps)
        for lane in lanes:
            lane.close()
    missed = [row for row in rows if not row.is_met]
    where = where_and_when(choose_device("auto"))
    if args.json:
        made = {
            **where,
            "mesh": settings,
            "batch": args.batch,
            "met": not missed,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(made, indent=2))
    else:
        columns = ["feature", "dtype", "step", "greedy", "cost", "bound"]
        cells = [
            [
                row.feature,
                row.dtype,
                f"{row.step_ms:.2f}",
                f"{row.greedy_ms:.2f}",
                f"{100 * row.cost:+.1f} %",
                "" if row.bound is None else f"{100 * row.bound:.0f} %{'' if row.is_met else ' MISSED'}",
            ]
            for row in rows
        ]
        print("\n".join([*heading(where), "", *format_table(columns, cells, num_left=2)]))
    for row in missed:
        told = f"{100 * row.cost:.1f} % of a greedy step, at most {100 * (row.bound or 0):.0f} %"
        print(f"MISSED: {row.feature} {row.dtype} costs {told}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
