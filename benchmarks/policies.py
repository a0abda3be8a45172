"""What does a hand-written policy give over the generic one, on the same model?

    decode-1    one request, 16 tokens in, 64 out             output tokens/s
    decode-16   16 requests, 16 tokens in, 64 out             output tokens/s
    prefill     one prompt of 512 tokens, one token out       prompt tokens/s

The hand-written policy runs our own layers: query, key and value as one product, gate and up as another, norms fused
with the residual sum, rotary embedding fused with storing keys and values. The generic one runs transformers' layers
with their linears sharded and our attention in them. `demo` is the demo model, whose weights are real; the others are
of the sizes below, with random weights. A round runs one, then the other, on prompts that no round before it had; the
table gives medians over rounds, and the median of the rounds' ratios. `tokens` says whether both drew the same.

    python benchmarks/policies.py
    python benchmarks/policies.py --model demo qwen3_moe --dtype bfloat16 --tp-size 2 --json
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from measuring import choose_device, format_table, heading, where_and_when

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.serving.demo_model import demo_model_path

POLICIES = {"hand-written": "auto", "generic": "generic"}
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
GROUPS = ("num_key_value_heads", "head_dim")  # what GPT-NeoX does not have
EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
MODELS: dict[str, Callable[[], Any]] = {
    "demo": demo_model_path,
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{name: SIZES[name] for name in SIZES if name not in GROUPS})
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)),
}


@dataclass(frozen=True)
class Workload:
    """Requests of one shape."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def counted(self) -> int:
        """The tokens of the rate."""
        return self.num_requests * (self.output_tokens if self.output_tokens > 1 else self.prompt_tokens)


WORKLOADS = {"decode-1": Workload(1, 16, 64), "decode-16": Workload(16, 16, 64), "prefill": Workload(1, 512, 1)}


@dataclass(frozen=True)
class Row:
    model: str
    workload: str
    dtype: str
    hand_written: float  # tokens/s
    generic: float
    ratio: float
    same_tokens: bool


def run(engine: InferenceEngine, work: Workload, prompts: Sequence[Sequence[int]]) -> tuple[float, list[list[int]]]:
    """Seconds, and what was drawn."""
    params = SamplingParams(temperature=0, max_tokens=work.output_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    outputs = engine.generate([list(prompt) for prompt in prompts], params, progress=False)
    return time.perf_counter() - started, [list(output.token_ids) for output in outputs]


def measure(model: str, dtype: str, workloads: Sequence[str], rounds: int, settings: dict[str, Any]) -> list[Row]:
    torch.manual_seed(0)
    weights = MODELS[model]()
    engines = {
        name: InferenceEngine(weights, InferenceConfig(dtype=dtype, policy=policy, **settings))
        for name, policy in POLICIES.items()
    }
    rows = []
    for workload in workloads:
        work, rng = WORKLOADS[workload], random.Random(workload)
        rates: dict[str, list[float]] = {name: [] for name in engines}
        same = True
        for round_ in range(rounds + 1):
            prompts = [[rng.randrange(100, 8000) for _ in range(work.prompt_tokens)] for _ in range(work.num_requests)]
            drawn = []
            for name, engine in engines.items():
                seconds, tokens = run(engine, work, prompts)
                drawn.append(tokens)
                if round_:  # the first warms up
                    rates[name].append(work.counted / seconds)
            same &= drawn[0] == drawn[1]
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        medians = [statistics.median(rates[name]) for name in engines]
        rows.append(Row(model, workload, dtype, *medians, ratio, same))
        print(f"{model} {workload} {dtype}: {ratio:.2f}", file=sys.stderr, flush=True)
    for engine in engines.values():
        engine.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    settings = {"tp_size": args.tp_size, "pp_size": args.pp_size}
    rows = [
        row
        for dtype in args.dtype
        for model in args.model
        for row in measure(model, dtype, args.workload, args.rounds, settings)
    ]
    where = where_and_when(choose_device("auto"))
    if args.json:
        print(json.dumps({**where, "mesh": settings, "rows": [asdict(row) for row in rows]}, indent=2))
        return
    columns = ["model", "workload", "dtype", "hand-written", "generic", "ratio", "tokens"]
    cells = [
        [
            row.model,
            row.workload,
            row.dtype,
            f"{row.hand_written:.1f}",
            f"{row.generic:.1f}",
            f"{row.ratio:.2f}",
            "same" if row.same_tokens else "differ",
        ]
        for row in rows
    ]
    print("\n".join([*heading(where), "", *format_table(columns, cells, num_left=3)]))


if __name__ == "__main__":
    main()
