"""Tokens per second of four workloads, beside a peer in the same run.

    single   one request, 128 tokens in, 128 out                                    output tokens/s
    ragged   32 requests at once, prompts of 32-256 tokens, outputs of 16-128       output tokens/s
    prefix   16 requests that share a 512-token prefix, 16 each after it, 64 out    output tokens/s
    prefill  one prompt of 1024 tokens, one token out                               prompt tokens/s

Prompts are the same random token ids for both; end tokens are ignored, so that lengths are as stated. The peer
transformers gets each workload as one left-padded batch, as `generate` takes it, and counts only the tokens that each
request asked for. Each round runs ours, then the peer; the table gives medians over rounds, and of the rounds' ratios.
Nothing stays cached between rounds: each draws new prompts. Exit code 1 if a ratio to transformers misses its target.

    python benchmarks/throughput.py --peer transformers
    python benchmarks/throughput.py --peer transformers --dtype bfloat16 --workload single ragged --json
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.serving.demo_model import demo_model_path


@dataclass(frozen=True)
class Workload:
    """Prompts with the number of tokens to generate for each, and which tokens the rate counts."""

    prompts: list[list[int]]
    num_new: list[int]
    counts_prompt: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(p) for p in self.prompts) if self.counts_prompt else sum(self.num_new)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40000) for _ in range(count)]


def single(rng: random.Random) -> Workload:
    return Workload([_ids(rng, 128)], [128])


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
TARGETS = {"single": 1.0, "ragged": 2.0, "prefix": 2.0, "prefill": 1.0}  # times transformers.generate


class MeshLM:
    """Ours."""

    def __init__(self, model: str, dtype: str, config: dict[str, int]) -> None:
        self.engine = InferenceEngine(model, InferenceConfig(dtype=dtype, **config))

    def run(self, work: Workload) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in work.num_new]
        outputs = self.engine.generate(work.prompts, params, progress=False)
        assert [len(output.token_ids) for output in outputs] == work.num_new

    def close(self) -> None:
        self.engine.close()


class Transformers:
    """transformers `generate`: one padded batch."""

    def __init__(self, model: str, dtype: str, config: dict[str, int]) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = self.model.to(self.device).eval()

    def run(self, work: Workload) -> None:
        longest, new = max(map(len, work.prompts)), max(work.num_new)
        pad = [[0] * (longest - len(p)) for p in work.prompts]
        ids = torch.tensor([zeros + p for zeros, p in zip(pad, work.prompts, strict=True)], device=self.device)
        mask = torch.tensor(
            [[0] * len(z) + [1] * len(p) for z, p in zip(pad, work.prompts, strict=True)], device=self.device
        )
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
        )
        assert out.shape[1] == longest + new

    def close(self) -> None:
        pass


PEERS = {"transformers": Transformers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--peer", choices=PEERS, action="append", default=[])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    model = args.model or str(demo_model_path())
    config = {"tp_size": args.tp_size, "pp_size": args.pp_size, "dp_size": args.dp_size}
    sizes = " × ".join(f"{name.removesuffix('_size')}={size}" for name, size in config.items())
    if not args.json:
        print(f"{model}, {sizes}; {torch.get_num_threads()} threads; {platform.processor() or platform.machine()}")
        print(f"torch {torch.__version__}, transformers {transformers.__version__}")

    results, missed = [], []
    for dtype in args.dtype:
        runners = {"meshlm": MeshLM(model, dtype, config)}
        runners |= {peer: PEERS[peer](model, dtype, config) for peer in args.peer}
        for name in args.workload:
            times: dict[str, list[float]] = {runner: [] for runner in runners}
            for round_ in range(args.rounds + 1):
                work = WORKLOADS[name](random.Random(f"{name}{round_}"))
                for runner, it in runners.items():
                    started = time.perf_counter()
                    it.run(work)
                    if round_:  # the first round warms up
                        times[runner].append(work.num_tokens / (time.perf_counter() - started))
            rates = {runner: statistics.median(values) for runner, values in times.items()}
            result: dict[str, Any] = {"workload": name, "dtype": dtype, "tokens_per_s": rates}
            line = f"{name:8} {dtype:9} meshlm {rates['meshlm']:8.1f}"
            for peer in args.peer:
                ratio = statistics.median(a / b for a, b in zip(times["meshlm"], times[peer], strict=True))
                result[f"ratio_{peer}"] = ratio
                line += f"   {peer} {rates[peer]:8.1f}   ratio {ratio:5.2f}"
                if peer == "transformers":
                    line += f" (target {TARGETS[name]:.0f}: {'ok' if ratio >= TARGETS[name] else 'MISSED'})"
                    if ratio < TARGETS[name]:
                        missed.append(f"{name} {dtype}: {ratio:.2f} times transformers, target {TARGETS[name]:.0f}")
            if not args.json:
                print(line, flush=True)
            results.append(result)
        for it in runners.values():
            it.close()
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        figures = {"mesh": config, "versions": versions, "targets": TARGETS, "met": not missed, "results": results}
        print(json.dumps(figures, indent=2))
    for miss in missed:
        print(f"MISSED: {miss}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
