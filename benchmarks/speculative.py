"""Speculative decoding: acceptance, tokens a step, and speed beside the same engine without it.

    copy    a passage is to be repeated word for word; greedy
    code    a Python file goes on; temperature 0.2
    prose   a story is told; temperature 0.8, since greedy prose of a small model runs in circles

Each at batch 1 and 8: as many requests at once, with prompts of their own in each round. A round runs the engine
without speculation, then with each method, which begins with nothing learned; the same tokens come out. The table gives
medians over rounds, and of the rounds' ratios to no speculation in the same round.

    drafted, accepted   tokens that were guessed for each that came out, and the share of them that was right
    tokens a step       that a sequence's step brings, on average
    speed-up            output tokens/s, prompts included, times those without speculation

The draft model is made on the fly of the target's first layers (--draft-layers), with the target's own last norm and
head. Nobody has trained it, so its acceptance is poor: it shows what drafting costs, not what a real one brings.

Exit code 1 if a method loses more than 2 % on prose.

    python benchmarks/speculative.py
    python benchmarks/speculative.py --task prose --batch 1 --method ngram suffix --rounds 7
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.config import SpeculativeConfig
from meshlm.serving.demo_model import demo_model_path

WORST = 0.98  # speed on prose, times no speculation

SUBJECTS = ("a lighthouse", "two brothers", "a lost dog", "the last train", "an old map", "a storm", "a clock", "snow")
PLACES = ("in a harbour", "on an island", "in the mountains", "by a river", "in a city", "at the border", "at night")
NAMES = ("account", "parser", "queue", "matrix", "cache", "graph", "token", "ledger", "sensor", "planet")
SENTENCES = (
    "The ship left port before dawn with forty barrels of salt and one passenger.",
    "Nobody had asked the mason why the third arch was lower than the others.",
    "In 1871 the council paid nine shillings for a bell that never rang.",
    "Copper wires hum in the cold, and the linesmen know the weather by their pitch.",
    "She counted the steps twice and found a different number each time.",
    "The recipe calls for rye flour, buttermilk, and an hour of patience.",
    "A letter addressed to the wrong street arrived after eleven years.",
    "Every spring the river takes a yard of the orchard and gives back a bank of sand.",
)


@dataclass(frozen=True)
class Task:
    """What is asked, given a random state, and how its tokens are drawn."""

    prompt: Callable[[random.Random], str | list[dict[str, str]]]
    temperature: float


def _copy(rng: random.Random) -> list[dict[str, str]]:
    text = " ".join(rng.sample(SENTENCES, 6))
    return [{"role": "user", "content": f"Repeat the following text exactly, word for word.\n\n{text}"}]


def _code(rng: random.Random) -> str:
    a, b, c = rng.sample(NAMES, 3)
    return (
        f'"""Keeps {a}s, and what {b}s need of them."""\n\nfrom dataclasses import dataclass\n\n\n@dataclass\n'
        f"class {a.title()}:\n    name: str\n    size: int = 0\n\n    def grow(self, count: int) -> None:\n"
        f'        if count < 0:\n            raise ValueError(f"{{count}} is negative")\n'
        f"        self.size += count\n\n\n"
        f"def find_{a}({a}s: list[{a.title()}], name: str) -> {a.title()} | None:\n    for {a} in {a}s:\n"
        f"        if {a}.name == name:\n            return {a}\n    return None\n\n\n@dataclass\nclass {b.title()}:\n"
        f'    """Has a {c} and some {a}s."""\n'
    )


def _prose(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell a story of {rng.choice(SUBJECTS)} {rng.choice(PLACES)}."}]


TASKS = {"copy": Task(_copy, 0.0), "code": Task(_code, 0.2), "prose": Task(_prose, 0.8)}
METHODS = ("ngram", "suffix", "draft_model")


def first_layers(model: str, count: int, folder: Path) -> str:
    """A model of the first layers of another, in a folder of its own."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(model)
    whole.model.layers = whole.model.layers[:count]
    whole.config.num_hidden_layers = count
    whole.config.layer_types = None
    whole.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Run:
    """One method on one round's requests."""

    tokens_per_s: float
    num_tokens: int
    num_drafted: int
    num_accepted: int

    @property
    def tokens_a_step(self) -> float:
        return self.num_tokens / (self.num_tokens - self.num_accepted)


def run(engine: InferenceEngine, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> tuple[Run, list[Any]]:
    started = time.perf_counter()
    outputs = engine.generate(list(prompts), list(params), progress=False)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(output.token_ids) for output in outputs)
    drafted, accepted = (sum(getattr(o, name) for o in outputs) for name in ("num_drafted", "num_accepted"))
    return Run(num_tokens / seconds, num_tokens, drafted, accepted), [output.token_ids for output in outputs]


def measure(engine: InferenceEngine, methods: dict[str, SpeculativeConfig], task: str, batch: int, args: Any) -> Any:
    """Medians of every method; {method: figures}."""
    runs: dict[str, list[Run]] = {name: [] for name in ("off", *methods)}
    num_changed = 0
    for round_ in range(args.rounds + 1):
        rng = random.Random(f"{task} {batch} {round_}")
        prompts = [TASKS[task].prompt(rng) for _ in range(batch)]
        params = [
            SamplingParams(
                temperature=TASKS[task].temperature, seed=rng.randrange(2**32), max_tokens=args.tokens, ignore_eos=True
            )
            for _ in range(batch)
        ]
        engine.disable_spec_decoding()
        off, expected = run(engine, prompts, params)
        found = {"off": off}
        for name, config in methods.items():
            engine.enable_spec_decoding(config)
            found[name], tokens = run(engine, prompts, params)
            num_changed += sum(a != b for a, b in zip(tokens, expected, strict=True))
        if round_:  # the first round warms up
            for name, it in found.items():
                runs[name].append(it)
    figures: dict[str, Any] = {"changed outputs": num_changed}
    for name, own in runs.items():
        drafted, accepted = sum(it.num_drafted for it in own), sum(it.num_accepted for it in own)
        ratios = [it.tokens_per_s / off.tokens_per_s for it, off in zip(own, runs["off"], strict=True)]
        figures[name] = {
            "drafted_per_token": drafted / sum(it.num_tokens for it in own),
            "acceptance": accepted / drafted if drafted else None,
            "tokens_a_step": statistics.median(it.tokens_a_step for it in own),
            "tokens_per_s": statistics.median(it.tokens_per_s for it in own),
            "speed_up": statistics.median(ratios),
        }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--draft", default=None, help="a draft model's directory (default: made of the first layers)")
    parser.add_argument("--draft-layers", type=int, default=4)
    parser.add_argument("--fixed", action="store_true", help="always draft as many tokens as can be")
    parser.add_argument("--num-speculative-tokens", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pp-size", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    model = args.model or str(demo_model_path())
    sizes = {"tp_size": args.tp_size, "pp_size": args.pp_size}
    common = {"num_speculative_tokens": args.num_speculative_tokens, "adaptive": not args.fixed}
    results, lost = [], []
    with tempfile.TemporaryDirectory() as folder:
        methods = {}
        for name in args.method:
            if name == "draft_model":
                draft = args.draft or first_layers(model, args.draft_layers, Path(folder))
                methods[name] = SpeculativeConfig(method=name, model=draft, **common)
            else:
                methods[name] = SpeculativeConfig(method=name, **common)
        config = InferenceConfig(
            dtype=args.dtype,
            device=args.device,
            enable_prefix_caching=False,
            max_model_len=1024,
            max_num_seqs=16,
            **sizes,
        )
        with InferenceEngine(model, config) as engine:
            if not args.json:
                print(f"{model}, {sizes}, {args.dtype}; {torch.get_num_threads()} threads; {platform.machine()}")
                if args.draft is None and "draft_model" in methods:
                    print(f"draft model: the target's first {args.draft_layers} layers, untrained")
                head = f"{'task':6} {'batch':>5} {'method':12} {'drafted':>8} {'accepted':>9} {'tokens a step':>14}"
                print(f"{head} {'tokens/s':>9} {'speed-up':>9}")
            for task in args.task:
                for batch in args.batch:
                    figures = measure(engine, methods, task, batch, args)
                    results.append({"task": task, "batch": batch, **figures})
                    num_changed = figures.pop("changed outputs")
                    for name, it in figures.items():
                        if task == "prose" and it["speed_up"] < WORST:
                            lost.append(f"{name} on prose at batch {batch}: {it['speed_up']:.3f} times no speculation")
                        if not args.json:
                            share = "" if it["acceptance"] is None else f"{it['acceptance']:.2f}"
                            line = f"{task:6} {batch:5} {name:12} {it['drafted_per_token']:8.2f} {share:>9}"
                            line += f" {it['tokens_a_step']:14.2f} {it['tokens_per_s']:9.1f} {it['speed_up']:9.3f}"
                            print(line, flush=True)
                    if num_changed and not args.json:
                        print(f"{num_changed} outputs differ: rounding decided between two tokens", flush=True)
    if args.json:
        print(json.dumps({"mesh": sizes, "lost": lost, "results": results}, indent=2))
    for loss in lost:
        print(f"LOST: {loss}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
