"""How long it takes until a model is ready, in fresh processes whose files are in the page cache.

    import     what `import meshlm` adds to `import torch`; with its names (InferenceEngine, SamplingParams): beside it
    one rank   from the call of InferenceEngine to its end, first imports of transformers included
    four       the same with tp=2 × pp=2

Each figure is the median of `--rounds` processes, which run in turn, after one that is not counted. Exit code 1 if one
misses its target.

    python benchmarks/startup.py
    python benchmarks/startup.py --rounds 3 --json
"""

import argparse
import json
import statistics
import subprocess
import sys

import torch
import transformers

from meshlm.serving.demo_model import demo_model_path

TARGETS_S = {"import": 0.3, "one rank": 5.0, "four ranks": 9.0}
_IMPORT = """
import time
import torch
started = time.perf_counter()
import meshlm
imported = time.perf_counter()
meshlm.InferenceEngine, meshlm.SamplingParams
print(imported - started, time.perf_counter() - started)
"""
_READY = """
import sys, time
import torch
from meshlm import InferenceConfig, InferenceEngine
model, dtype, tp_size, pp_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
started = time.perf_counter()
engine = InferenceEngine(model, InferenceConfig(dtype=dtype, tp_size=tp_size, pp_size=pp_size))
print(time.perf_counter() - started, max(rank.load_s for rank in engine.ranks))
engine.close()
"""


def measure(program: str, *arguments: str) -> list[float]:
    """What a fresh interpreter prints: seconds."""
    command = [sys.executable, "-c", program, *arguments]
    return [float(word) for word in subprocess.run(command, check=True, capture_output=True).stdout.split()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model directory (default: the demo model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    model = args.model or str(demo_model_path())
    programs = {
        "import": (_IMPORT,),
        "one rank": (_READY, model, args.dtype, "1", "1"),
        "four ranks": (_READY, model, args.dtype, "2", "2"),
    }
    beside = {"import": "with its names", "one rank": "of it, loading", "four ranks": "of it, loading"}
    found: dict[str, list[list[float]]] = {name: [] for name in programs}
    for round_ in range(args.rounds + 1):
        for name, program in programs.items():
            seconds = measure(*program)
            if round_:
                found[name].append(seconds)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    missed = [name for name, (seconds, _) in medians.items() if seconds > TARGETS_S[name]]
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        results = [
            {"name": name, "seconds": s, beside[name]: b, "target_s": TARGETS_S[name]}
            for name, (s, b) in medians.items()
        ]
        print(json.dumps({"versions": versions, "met": not missed, "results": results}, indent=2))
    else:
        for name, (seconds, other) in medians.items():
            met = "MISSED" if name in missed else "ok"
            print(f"{name:10} {seconds:6.2f} s  (target {TARGETS_S[name]} s: {met}; {beside[name]} {other:.2f} s)")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
