"""Tokens per second of whole models on a GPU, beside transformers in the same run, with random weights.

    decode      one request, 512 tokens in, 257 out: tokens/s after the first, from the time of all less the time of one
    prefill     one prompt of 2048 or 32768 tokens, one token out: prompt tokens/s
    requests    256 requests at once, each with 100-1024 tokens in and 100-1024 out (nano-vllm's workload): output
                tokens/s

    MeshLM      an engine as `InferenceEngine(config, InferenceConfig(…))` makes it; a transformers config as the model
                has its weights drawn on the device (the random-weights load path)
    of limit    of decode: the share of the tokens/s that memory allows, which are the measured bandwidth of copying
                1 GiB over the bytes that a token must read: all weights (but for an embedding table that is not the LM
                head too) and the keys and values of the tokens before it
    generate    transformers' `generate` with the same shape: for decode with a static cache and compiled, as it
                compiles itself, for prefill with its default cache; the first calls, which compile, are left out
    continuous  transformers' continuous batching, with its own defaults; it takes FlashAttention where it finds that,
                else torch's scaled_dot_product_attention, and a line before the table says which
    ratio       MeshLM's rate over the peer's in the row
    target      what must be reached, and whether it is. Exit code 1 if one is missed on a GPU

Targets: decode of the 8B model at 85 % of the limit; requests 3 times as fast as continuous batching. Prompts are the
same random token ids for all, draws are greedy, end tokens ignored, nothing is found in a prefix cache. Rates are of
medians of up to three rounds, but for `requests`: one round.

Each engine and model is a part in a process of its own, which has the device's memory to itself. All parts together end
within --budget-s: each may take its share of the time that is left. Where `requests` does not end in time, it is cut:
its rate is that of the tokens until then, which leaves out the end, when few requests run, so that it is rather too
high; it bears the mark "cut". What a part had no time for at all, or failed at, is a line before the table.

With --profile a part more traces decode steps of MeshLM with torch.profiler and prints the operators that take the most
time, and the gaps in which the device waits for the host, by what ran before and after.

On a CPU, and with --toy, models and workloads are tiny, so that a run shows that the script works; no target is judged.
Results go to docs/results, as JSON and as the table in text; of a toy run only if --out says where.

    python benchmarks/gpu.py                              # under 8 minutes
    python benchmarks/gpu.py --profile --model llama --engine meshlm
    python benchmarks/gpu.py --toy
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import RESULTS, choose_device, heading, result_stem, where_and_when, write_results
from whole_models.engines import ENGINES
from whole_models.part import run_part
from whole_models.report import lines_of, table
from whole_models.tasks import MODELS, TOY_MODELS, Result, Task

GRACE_S = 8.0  # for a part to end by itself, once its time is over
SHARES_S = {  # of the time, one to another
    ("llama", "meshlm"): 95,
    ("qwen", "meshlm"): 50,
    ("llama", "generate"): 110,
    ("qwen", "generate"): 65,
    ("llama", "continuous"): 90,
    ("qwen", "continuous"): 50,
    ("llama", "profile"): 40,
    ("qwen", "profile"): 30,
}


def run_in_child(tasks: Sequence[Task], timeout_s: float) -> list[dict[str, Any]]:
    """What a part wrote before it ended, or was ended."""
    with tempfile.TemporaryDirectory(prefix="meshlm-gpu-") as directory:
        results = Path(directory) / "results"
        results.touch()
        part = json.dumps([asdict(task) for task in tasks])
        command = [sys.executable, __file__, "--part", part, "--part-results", str(results)]
        process = subprocess.Popen(command, start_new_session=True)
        note = None
        try:
            if process.wait(timeout_s) != 0:
                note = f"its process ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            note = f"ended after {timeout_s:.0f} s: what is missing had no time"
        finally:
            with suppress(ProcessLookupError):  # its own children too: compilers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if note is not None:
        names = ", ".join(f"{task.shape.label}, {' and '.join(task.engines)}" for task in tasks)
        lines.append({"kind": "note", "value": f"{names}: {note}"})
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models and workloads (always on a CPU)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--profile", action="store_true", help="trace decode steps too")
    parser.add_argument("--profile-seqs", type=int, default=1, help="sequences in a traced step")
    parser.add_argument("--attention-backend", default="auto", help="of MeshLM")
    parser.add_argument("--max-num-batched-tokens", type=int, help="of MeshLM (default: its own)")
    parser.add_argument("--budget-s", type=float, default=450.0, help="seconds that all parts together may take")
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: docs/results, or none for a toy run)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        run_part(
            [Task(**{**task, "engines": tuple(task["engines"])}) for task in json.loads(args.part)], args.part_results
        )
        return 0

    began = time.time()
    device = choose_device(args.device)
    toy = args.toy or device.type != "cuda"
    engines = [*args.engine, *(["profile"] if args.profile else [])]
    planned = [key for key in SHARES_S if key[0] in args.model and key[1] in engines]

    def task(model: str, engines: tuple[str, ...], ends_at: float) -> Task:
        options = (args.max_num_batched_tokens, args.attention_backend, args.profile_seqs)
        return Task(model, engines, str(device), toy, ends_at, *options)

    where = where_and_when(device)
    print("\n".join(heading(where)), flush=True)
    tasks, written = list[Task](), list[dict[str, Any]]()
    if toy:  # one process for all: most of its time is that of imports
        ends_at = began + args.budget_s
        tasks = [task(model, (engine,), ends_at) for model, engine in planned]
        written = run_in_child(tasks, args.budget_s + GRACE_S)
    else:
        for index, (model, engine) in enumerate(planned):
            left = began + args.budget_s - time.time()
            allotted = left * SHARES_S[model, engine] / sum(SHARES_S[key] for key in planned[index:])
            tasks.append(task(model, (engine,), time.time() + allotted - GRACE_S))
            written += run_in_child(tasks[-1:], allotted)

    results = [Result(**line["value"]) for line in written if line["kind"] == "result"]
    notes = [line["value"] for line in written if line["kind"] == "note"]
    lines, judged = lines_of(results, tasks), not toy and "meshlm" in engines
    missed = [line for line in lines if line.met is False]
    text = [*heading(where), *notes, "", *table(lines, TOY_MODELS if toy else MODELS, judged)]
    text.append("toy sizes: targets are not judged" if toy else f"{time.time() - began:.0f} s in all")
    out = args.out or (None if toy else RESULTS)
    if out is not None:
        result = {
            **where,
            "toy": toy,
            "seconds": time.time() - began,
            "met": not missed if judged else None,
            "notes": notes,
            "results": [asdict(result) for result in results],
            "lines": [
                {
                    "model": line.model,
                    "workload": line.workload,
                    "ratio": line.ratio,
                    "met": line.met if judged else None,
                }
                for line in lines
            ],
            "profiles": [line["value"] for line in written if line["kind"] == "profile"],
        }
        print(f"written: {write_results(out, result_stem('gpu', where), result, text)}")
    print("\n" + "\n".join(text))
    return 1 if judged and missed else 0


if __name__ == "__main__":
    sys.exit(main())
