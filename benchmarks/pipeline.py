"""How busy are the stages of a pipeline, by the number of sequences in flight?

Each run decodes `num_seqs` sequences at once on `pp_size` stages. Its window begins when every prompt is computed and
the pipeline is empty, and ends with the last step; all sequences live as long as it. Over the window

    busy      share of it in which a stage computed: seconds inside its steps, less those of waiting for another stage
    bubble    1 - busy, averaged over the stages; target at 16 sequences on 2 stages: at most 15 %
    uneven    the part of the bubble that unequal stages explain: 1 - mean / longest of their times a step

The figures are those of the run with the median bubble. With fewer cores than stages (plus one for the driver) the
processes take turns, and "busy" includes a stage's wait for a core. Exit code 1 if the target is missed.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --pp-size 3 --num-seqs 16 --dtype bfloat16 --json
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.serving.demo_model import demo_model_path

TARGET = {"pp_size": 2, "num_seqs": 16, "bubble": 0.15}
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Run:
    """One measured window."""

    pp_size: int
    num_seqs: int
    layers: list[int]  # of each stage
    steps: int  # of each stage
    elapsed_s: float
    tokens_per_s: float
    busy: list[float]  # share of the window, by stage
    step_ms: list[float]  # mean time of a step, by stage
    bubble: float
    uneven: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=None, help="default: the demo model")
    parser.add_argument("--pp-size", type=int, action="append", help="can be given several times (default: 2, 3)")
    parser.add_argument("--num-seqs", type=int, action="append", help="as above (default: 1, 2, 4, 8, 16)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens a sequence in the window")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    runs = []
    for pp_size in args.pp_size or [2, 3]:
        config = InferenceConfig(pp_size=pp_size, dtype=args.dtype, enable_prefix_caching=False)
        with InferenceEngine(args.model or demo_model_path(), config) as engine:
            if not args.json:
                print_header(engine)
            measure(engine, pp_size, args.new_tokens)  # warms up
            for num_seqs in args.num_seqs or [1, 2, 4, 8, 16]:
                repeated = [measure(engine, num_seqs, args.new_tokens) for _ in range(args.repeats)]
                runs.append(sorted(repeated, key=lambda run: run.bubble)[len(repeated) // 2])
                if not args.json:
                    print_row(runs[-1])
    missed = [
        run
        for run in runs
        if (run.pp_size, run.num_seqs) == (TARGET["pp_size"], TARGET["num_seqs"]) and run.bubble > TARGET["bubble"]
    ]
    if args.json:
        print(json.dumps({"target": TARGET, "met": not missed, "runs": [asdict(run) for run in runs]}, indent=2))
    for run in missed:
        print(
            f"MISSED: bubble {run.bubble:.1%} at {run.num_seqs} sequences on pp_size={run.pp_size}, "
            f"target {TARGET['bubble']:.0%}",
            file=sys.stderr,
        )
    return 1 if missed else 0


def measure(engine: InferenceEngine, num_seqs: int, new_tokens: int) -> Run:
    params = SamplingParams(max_tokens=new_tokens + 1, ignore_eos=True, temperature=0.0, detokenize=False)
    for index in range(num_seqs):
        engine.add_request([1000 + index] * PROMPT_TOKENS, params)
    started: set[str] = set()
    while len(started) < num_seqs:  # the first token of each: all prompts are computed
        started |= {output.request_id for output in engine.step()}
    before = engine.busy()  # empties the pipeline
    tokens = engine.stats().num_output_tokens
    begin = time.monotonic()
    while engine.has_unfinished():
        engine.step()
    after = engine.busy()
    elapsed = max(rank["last_end_s"] for rank in after) - begin
    seconds = [new["busy_s"] - old["busy_s"] for new, old in zip(after, before, strict=True)]
    steps = int(after[0]["steps"] - before[0]["steps"])
    busy = [each / elapsed for each in seconds]
    return Run(
        pp_size=engine.config.pp_size,
        num_seqs=num_seqs,
        layers=[rank.layers[1] - rank.layers[0] for rank in engine.ranks],
        steps=steps,
        elapsed_s=elapsed,
        tokens_per_s=(engine.stats().num_output_tokens - tokens) / elapsed,
        busy=busy,
        step_ms=[each / steps * 1000 for each in seconds],
        bubble=1 - sum(busy) / len(busy),
        uneven=1 - sum(busy) / len(busy) / max(busy),
    )


def print_header(engine: InferenceEngine) -> None:
    layers = " + ".join(str(rank.layers[1] - rank.layers[0]) for rank in engine.ranks)
    print(f"pp_size={engine.config.pp_size}: {layers} layers, {engine.ranks[0].dtype} on {engine.ranks[0].device}")
    stages = "".join(f"  stage {rank.rank}: busy  ms/step" for rank in engine.ranks)
    print("  sequences  steps  tokens/s  bubble  uneven" + stages, flush=True)


def print_row(run: Run) -> None:
    stages = "".join(f"{busy:>15.1%}  {ms:>7.1f}" for busy, ms in zip(run.busy, run.step_ms, strict=True))
    figures = f"{run.tokens_per_s:>8.1f}  {run.bubble:>6.1%}  {run.uneven:>6.1%}"
    print(f"  {run.num_seqs:>9}  {run.steps:>5}  {figures}{stages}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
