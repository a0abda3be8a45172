"""Tokens per second of four workloads, beside peers in the same run.

    single   one request, 128 tokens in, 128 out: decode only                       output tokens/s
    ragged   32 requests at once, prompts of 32-256 tokens, outputs of 16-128       output tokens/s
    prefix   16 requests that share a 512-token prefix, 16 each after it, 64 out    output tokens/s
    prefill  one prompt of 1024 tokens, one token out                               prompt tokens/s

Decode only: another prompt of the same length with one token out is timed just before and subtracted, with the token.
Prompts are the same random token ids for all; end tokens are ignored, so that lengths are as stated, which is checked.
Each runs in processes of its own, which are stopped while another is timed, and each round runs ours, then each peer;
the table gives medians over rounds, and of the rounds' ratios. Nothing stays cached between rounds: each draws new
prompts. Exit code 1 if a ratio misses its target.

    transformers   `generate`: one left-padded batch
    batching       transformers' continuous batching
    vllm           as its documents advise on a CPU: libraries preloaded, cores bound, one process
    vllm-default   vLLM as installed
    openvino       OpenVINO GenAI's continuous batching
    llamacpp       llama.cpp, one request after another

The first two need nothing more than ours; README.md tells how to build environments for the others. One is given by its
path, or lies in the folder MESHLM_PEERS as vllm, openvino or llamacpp. A peer that cannot start is left out, with a
message; what a peer makes of the model on its first start can take minutes.

    python benchmarks/throughput.py --peer transformers
    python benchmarks/throughput.py --peer vllm=~/peers/vllm --peer openvino=~/peers/openvino --dtype bfloat16
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.protocol import Child, RunnerError

from meshlm.serving.demo_model import demo_model_path

SCRIPTS = Path(__file__).parent / "peers"
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WARM_TOKENS = 16  # of each request


@dataclass(frozen=True)
class Workload:
    """Prompts with the number of tokens to generate for each, and which tokens the rate counts."""

    prompts: list[list[int]]
    num_new: list[int]
    counts_prompt: bool = False
    prefill: list[list[int]] | None = None  # other prompts of the same lengths: their first tokens do not count

    def warm_up(self, runner: Child) -> None:
        runner.seconds(self.prompts, [min(n, WARM_TOKENS) for n in self.num_new])

    def rate(self, runner: Child) -> float:
        """Tokens a second."""
        if self.prefill is not None:
            before = runner.seconds(self.prefill, [1] * len(self.prefill))
            return (sum(self.num_new) - len(self.prefill)) / (runner.seconds(self.prompts, self.num_new) - before)
        counted = sum(map(len, self.prompts)) if self.counts_prompt else sum(self.num_new)
        return counted / runner.seconds(self.prompts, self.num_new)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40000) for _ in range(count)]


def single(rng: random.Random) -> Workload:
    return Workload([_ids(rng, 128)], [128], prefill=[_ids(rng, 128)])


def ragged(rng: random.Random) -> Workload:
    return Workload([_ids(rng, rng.randint(32, 256)) for _ in range(32)], [rng.randint(16, 128) for _ in range(32)])


def prefix(rng: random.Random) -> Workload:
    shared = _ids(rng, 512)
    return Workload([shared + _ids(rng, 16) for _ in range(16)], [64] * 16)


def prefill(rng: random.Random) -> Workload:
    return Workload([_ids(rng, 1024)], [1], counts_prompt=True)


WORKLOADS: dict[str, Callable[[random.Random], Workload]] = {
    "single": single,
    "ragged": ragged,
    "prefix": prefix,
    "prefill": prefill,
}


@dataclass(frozen=True)
class Peer:
    script: str
    environment: str | None = None  # the folder of MESHLM_PEERS; None: this Python has what it needs
    words: tuple[str, ...] = ()


PEERS = {
    "transformers": Peer("run_transformers.py"),
    "batching": Peer("run_batching.py"),
    "vllm": Peer("run_vllm.py", "vllm", ("tuned",)),
    "vllm-default": Peer("run_vllm.py", "vllm"),
    "openvino": Peer("run_openvino.py", "openvino"),
    "llamacpp": Peer("run_llamacpp.py", "llamacpp"),
}
OVER_TRANSFORMERS = {"single": 2.0, "ragged": 4.0, "prefix": 6.0, "prefill": 1.8}  # times its `generate`, bfloat16
OVER_ANY = {"single": 1.3, "ragged": 1.2, "prefix": 1.2, "prefill": 1.2}  # times any other peer, bfloat16


def target(peer: str, workload: str, dtype: str) -> float:
    if dtype != "bfloat16":
        return 1.0
    return (OVER_TRANSFORMERS if peer == "transformers" else OVER_ANY)[workload]


def python_of(given: str) -> tuple[str, str]:
    """The peer's name, and the Python of its environment: of `name=path`, or of a name alone."""
    name, _, path = given.partition("=")
    environment = PEERS[name].environment
    if path:
        folder = Path(path).expanduser()
    elif environment is None:
        return name, sys.executable
    else:
        folder = Path(os.environ.get("MESHLM_PEERS", "")) / environment
    return name, str(folder.absolute() / "bin" / "python")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def start(stack: ExitStack, python: str, script: str, *words: str) -> Child:
    """A runner that is ready. Raises RunnerError."""
    if not Path(python).exists():
        raise RunnerError(f"there is no {python}")
    environment = dict(os.environ)
    if python != sys.executable:  # what is ours is not on its path
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTHON")}
    runner = stack.enter_context(Child(python, SCRIPTS / script, *words, environment=environment))
    started = time.monotonic()
    try:
        runner.wait_until_ready()
    except RunnerError:
        runner.close()
        raise
    say(f"{script}: ready after {time.monotonic() - started:.0f} s")
    return runner


def start_all(stack: ExitStack, model: str, dtype: str, ours: list[str], peers: dict[str, str]) -> dict[str, Child]:
    words = (model, dtype, str(THREADS))
    runners = {"meshlm": start(stack, sys.executable, "run_meshlm.py", *words, *ours)}
    for name, python in peers.items():
        try:
            runners[name] = start(stack, python, PEERS[name].script, *words, *PEERS[name].words)
        except RunnerError as error:
            say(f"skipped {name} {dtype}: {error}")
    for runner in runners.values():
        runner.stop()
    return runners


def measure(name: str, dtype: str, runners: dict[str, Child], num_rounds: int) -> dict[str, Any]:
    """Leaves the peers that fail out of `runners`, here and from now on. Raises RunnerError where ours fails."""
    rates: dict[str, list[float]] = {runner: [] for runner in runners}
    for round_ in range(num_rounds + 1):  # the first warms up
        work = WORKLOADS[name](random.Random(f"{name}{round_}"))
        for runner, child in list(runners.items()):
            try:
                if round_:
                    rates[runner].append(work.rate(child))
                else:
                    work.warm_up(child)
            except RunnerError as error:
                if runner == "meshlm":
                    raise
                say(f"left out {runner} {dtype} from {name} on: {error}")
                runners.pop(runner).close()
    ratios = {
        peer: statistics.median(a / b for a, b in zip(rates["meshlm"], rates[peer], strict=True))
        for peer in runners
        if peer != "meshlm"
    }
    return {
        "workload": name,
        "dtype": dtype,
        "tokens_per_s": {runner: statistics.median(rates[runner]) for runner in runners},
        "ratios": ratios,
        "targets": {peer: target(peer, name, dtype) for peer in ratios},
    }


def missed(result: dict[str, Any]) -> list[str]:
    return [peer for peer, ratio in result["ratios"].items() if ratio < result["targets"][peer]]


def table(result: dict[str, Any]) -> str:
    rates = result["tokens_per_s"]
    lines = [f"{result['workload']} {result['dtype']}", f"  meshlm       {rates['meshlm']:8.1f}"]
    for peer, ratio in result["ratios"].items():
        verdict = "MISSED" if peer in missed(result) else "ok"
        lines.append(
            f"  {peer:12} {rates[peer]:8.1f}   ratio {ratio:6.2f}, target {result['targets'][peer]}: {verdict}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=ENVIRONMENT]", help=", ".join(PEERS))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    unknown = [given for given in args.peer if given.partition("=")[0] not in PEERS]
    if unknown:
        parser.error(f"no peer {', '.join(unknown)}: there are {', '.join(PEERS)}")
    model = args.model or str(demo_model_path())
    ours = [f"{axis}_size={getattr(args, f'{axis}_size')}" for axis in ("tp", "pp", "dp")]
    if not args.json:
        print(f"{model}, {', '.join(ours)}; {THREADS} threads; {platform.processor() or platform.machine()}")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the runners end as with Ctrl-C
    results: list[dict[str, Any]] = []
    versions: dict[str, dict[str, str]] = {}
    for dtype in args.dtype:
        with ExitStack() as stack:
            runners = start_all(stack, model, dtype, ours, dict(map(python_of, args.peer)))
            versions |= {name: runner.versions for name, runner in runners.items()}
            for name in args.workload:
                result = measure(name, dtype, runners, args.rounds)
                results.append(result)
                if not args.json:
                    print(table(result), flush=True)
    misses = [
        f"{result['workload']} {result['dtype']}: {result['ratios'][peer]:.2f} times {peer}, "
        f"target {result['targets'][peer]}"
        for result in results
        for peer in missed(result)
    ]
    if args.json:
        figures = {"mesh": ours, "threads": THREADS, "versions": versions, "met": not misses, "results": results}
        print(json.dumps(figures, indent=2))
    else:
        print(*(f"{name}: {versions[name]}" for name in versions), sep="\n")
    for miss in misses:
        say(f"MISSED: {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
