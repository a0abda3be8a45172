"""How near decoding and prefill on a CPU come to what the machine allows.

Measured first: the rate at which memory is read, and that of matrix products; then the model's linear layers alone, one
layer after the other with weights of their own, in each form that can be bound: torch's plain product, oneDNN's packed
weight, and the bound one (`kernels/linear.py`). Against that:

    decode, batch 1    tokens/s, of those that reading all weights once a token would allow, as
                       they are in the checkpoint; held compact they are less to read           70 %
    decode, batch 32   the linear layers at their best form, of a step                          75 %
    prefill of 1024    the linear layers at their best form, of all                             80 %

The LM head is one of the linear layers. Of a prefill it takes one row, and so does the last layer after its attention.
Each figure is the median over rounds, in each of which all are measured, one after the other. Exit code 1 if a target
is missed.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --dtype bfloat16 --rounds 5 --json
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import format_table, heading, where_and_when
from torch import Tensor
from transformers import AutoConfig

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.kernels import select_ops
from meshlm.serving.demo_model import demo_model_path

CPU = torch.device("cpu")
BATCH, PROMPT = 32, 1024
DECODE_PROMPT, DECODE_STEPS = 64, 32  # tokens of each sequence that decodes
TARGETS = {"decode 1": 0.70, "decode 32": 0.75, "prefill 1024": 0.80}


def median_s(function: Callable[[], Any], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def read_rate() -> Callable[[], float]:
    """GB/s of reading memory in a line, far more than caches hold."""
    data = torch.ones(2**27)
    return lambda: data.nbytes / median_s(data.sum) / 1e9


def product_rate(dtype: torch.dtype) -> Callable[[], float]:
    """GFLOPS of a square product."""
    n = 2048
    a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
    return lambda: 2 * n**3 / median_s(lambda: F.linear(a, b)) / 1e9


class Linears:
    """The linear layers of a model of this config, the LM head last, with random weights, in one form each."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        query, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = [(query + 2 * kv, hidden), (hidden, query), (2 * inner, hidden), (hidden, inner)]
        shapes = [*shapes * config.num_hidden_layers, (config.vocab_size, hidden)]
        self.weights = [torch.randn(shape).to(dtype) for shape in shapes]
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in self.weights]
        product, bind = torch.ops.mkldnn._linear_pointwise.default, select_ops(CPU, dtype).bind_linear
        bound = [bind(weight) for weight in self.weights]
        self.forms: dict[str, Callable[[int, Tensor], Tensor]] = {
            "plain": lambda i, x: F.linear(x, self.weights[i]),
            "oneDNN": lambda i, x: product(x, packed[i], None, "none", [], ""),
            "bound": lambda i, x: bound[i](x, None),
        }
        self._inputs = {size: torch.randn(PROMPT, size).to(dtype) for size in {hidden, query, inner}}

    def seconds(self, form: str, rows: int) -> float:
        product = self.forms[form]
        inputs = [self._inputs[weight.shape[1]][:rows] for weight in self.weights]
        if rows == PROMPT:
            inputs[-4:] = [x[:1] for x in inputs[-4:]]  # all but the last layer's first, for queries, keys and values

        def run() -> None:
            for index, x in enumerate(inputs):
                product(index, x)

        return median_s(run, 3 if rows < PROMPT else 1)


class Model:
    """The engine, timed as a whole."""

    def __init__(self, model: str, dtype: str) -> None:
        self.engine = InferenceEngine(model, InferenceConfig(dtype=dtype, max_num_seqs=BATCH))

    def step_s(self, batch: int, rng: random.Random) -> float:
        """Of a decode step, all of it, with contexts of DECODE_PROMPT tokens and a little more."""
        engine, steps = self.engine, []
        params = SamplingParams(temperature=0, max_tokens=DECODE_STEPS, ignore_eos=True, detokenize=False)
        for _ in range(batch):
            engine.add_request(_ids(rng, DECODE_PROMPT), params)
        while engine.has_unfinished():
            steps.append(median_s(engine.step, 1))
        return statistics.median(steps[-DECODE_STEPS // 2 :])

    def prefill_s(self, rng: random.Random) -> float:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        prompt = _ids(rng, PROMPT)
        return median_s(lambda: self.engine.generate([prompt], params, progress=False), 1)


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(100, 40000) for _ in range(count)]


def measure(model: str, dtype: str, rounds: int) -> dict[str, Any]:
    torch_dtype = getattr(torch, dtype)
    config = AutoConfig.from_pretrained(model)
    linears, engine = Linears(config, torch_dtype), Model(model, dtype)
    rates = {"read GB/s": read_rate(), "product GFLOPS": product_rate(torch_dtype)}
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with engine.engine, torch.inference_mode():
        for round_ in range(rounds + 1):
            rng = random.Random(round_)
            if round_ == 1:
                found.clear()  # the first round warms up
            for name, rate in rates.items():
                note(name, rate())
            for rows in (1, BATCH, PROMPT):
                for form in linears.forms:
                    note(f"{form} {rows}", 1e3 * linears.seconds(form, rows))
            note("step 1", 1e3 * engine.step_s(1, rng))
            note(f"step {BATCH}", 1e3 * engine.step_s(BATCH, rng))
            note(f"step {PROMPT}", 1e3 * engine.prefill_s(rng))
    result: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
    num_weights = sum(weight.numel() for weight in linears.weights)
    bound_ms = num_weights * torch_dtype.itemsize / result["read GB/s"] / 1e6
    best = {rows: min(result[f"{form} {rows}"] for form in linears.forms) for rows in (1, BATCH, PROMPT)}
    result["shares"] = {
        "decode 1": bound_ms / result["step 1"],
        f"decode {BATCH}": best[BATCH] / result[f"step {BATCH}"],
        f"prefill {PROMPT}": best[PROMPT] / result[f"step {PROMPT}"],
    }
    result["memory bound ms"], result["best"] = bound_ms, best
    return {"dtype": dtype, **result}


def table(result: dict[str, Any]) -> list[str]:
    columns = [result["dtype"], "plain ms", "oneDNN ms", "bound ms", "whole ms", "limit ms", "share", "target"]
    rows = []
    for name, target in TARGETS.items():
        count = name.split()[1]
        limit = result["memory bound ms"] if count == "1" else result["best"][int(count)]
        times = [result[f"{form} {count}"] for form in ("plain", "oneDNN", "bound", "step")]
        share = result["shares"][name]
        verdict = f"{target:.0%}: {'ok' if share >= target else 'MISSED'}"
        rows.append([name, *(f"{ms:.1f}" for ms in (*times, limit)), f"{share:.0%}", verdict])
    rates = f"memory is read at {result['read GB/s']:.1f} GB/s, products run at {result['product GFLOPS']:.0f} GFLOPS"
    return [rates, *format_table(columns, rows, 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a directory with a Llama-like model (default: the demo model)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    model, where = args.model or str(demo_model_path()), where_and_when(CPU)
    results = []
    if not args.json:
        print("\n".join(heading(where)))
    for dtype in args.dtype:
        results.append(measure(model, dtype, args.rounds))
        if not args.json:
            print("\n".join(table(results[-1])), flush=True)
    if args.json:
        print(json.dumps({"where": where, "results": results}, indent=2))
    missed = any(result["shares"][name] < target for result in results for name, target in TARGETS.items())
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
