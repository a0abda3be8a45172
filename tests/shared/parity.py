"""Every family on every mesh against transformers; run as a script it writes docs/families.md.

    python tests/shared/parity.py              all families (minutes)
    python tests/shared/parity.py llama gpt2   some, whose results it prints

Three crews of processes go through the families one after the other, each building its engine anew: two processes on
their own, which also make the models and their references; two ranks of torchrun; four ranks of torchrun. What takes a
process along, or hangs, is noted, and a new crew goes on with the next.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from families import FAMILIES, NOT_BUILT, greedy_reference, has_experts, tiny_model

from meshlm import InferenceConfig, InferenceEngine
from meshlm.policies import supported_architectures

MESHES: dict[str, dict[str, Any]] = {
    "1": {},
    "tp2": {"tp_size": 2},
    "tp2 of experts": {"tp_size": 2, "expert_parallel": True},
    "pp2": {"pp_size": 2},
    "tp2×pp2": {"tp_size": 2, "pp_size": 2},
}
OPTIONAL = ("tp2 of experts",)  # where a family's experts may be refused
DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
ITEM_TIMEOUT_S = 90.0
CONFIG = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_num_batched_tokens": 32, "num_kv_blocks": 128}


def policy(family: str) -> str:
    return "hand-written" if FAMILIES[family] in supported_architectures() else "generic"


def meshes_of(family: str) -> list[str]:
    """Those that a family is tried on."""
    left_out = set()
    if policy(family) == "generic":
        left_out.add("tp2×pp2")
    if not has_experts(family):
        left_out.add("tp2 of experts")
    return [mesh for mesh in MESHES if mesh not in left_out]


@dataclass(frozen=True)
class Result:
    """What became of a family on a mesh."""

    family: str
    mesh: str
    passed: bool
    refused: bool = False  # by the engine, before anything was loaded
    reason: str = ""
    faults: list[str] = field(default_factory=list)  # of the reference: what keeps it from telling right from wrong


# ---- in a crew's processes -------------------------------------------------------------------------------------------


def work(folder: Path, crew: str, first: int) -> None:
    """Does a crew's items from the `first` on; rank 0 writes a line for each."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    for family, mesh in json.loads((folder / f"{crew}.json").read_text())[first:]:
        result = attempt(folder, family, mesh)
        if rank == 0:
            with (folder / f"{crew}.results").open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def attempt(folder: Path, family: str, mesh: str) -> Result:
    path, reference = folder / family, folder / f"{family}.json"
    if mesh == "1":
        model = tiny_model(family)
        model.save_pretrained(path)
    faults: list[str] = []
    try:
        engine = InferenceEngine(path, InferenceConfig(**CONFIG, **MESHES[mesh]))
    except ValueError as error:
        return Result(family, mesh, False, refused=True, reason=_one_line(error, folder))
    except Exception as error:
        return Result(family, mesh, False, reason=_one_line(error, folder))
    with engine:
        if mesh == "1":
            expected = greedy_reference(model)
            reference.write_text(json.dumps(asdict(expected)))
            faults = expected.faults()
        expected = json.loads(reference.read_text())
        params = {"temperature": 0, "max_tokens": len(expected["outputs"][0]), "ignore_eos": True, "detokenize": False}
        try:
            outputs = engine.generate(expected["prompts"], params, progress=False)
        except Exception as error:
            return Result(family, mesh, False, reason=_one_line(error, folder), faults=faults)
    differing = [
        f"prompt of {len(prompt)} tokens from output token {_first_difference(output.token_ids, wanted)} on"
        for prompt, output, wanted in zip(expected["prompts"], outputs, expected["outputs"], strict=True)
        if list(output.token_ids) != wanted
    ]
    reason = f"differs from transformers: {'; '.join(differing)}" if differing else ""
    return Result(family, mesh, not differing, reason=reason, faults=faults)


def _first_difference(got: Sequence[int], wanted: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(got))


def _one_line(error: Exception, folder: Path) -> str:
    """What stands before a list of all that is supported; of a traceback its end."""
    lines = [line.strip() for line in str(error).replace(f"{folder}/", "").splitlines() if line.strip()]
    if isinstance(error, ValueError):
        return re.split("; (nearest )?supported", " ".join(lines))[0]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


# ---- crews -----------------------------------------------------------------------------------------------------------


def run_crew(folder: Path, crew: str, num_ranks: int, items: Sequence[tuple[str, str]]) -> list[Result]:
    """Results of (family, mesh) items, in order, by processes that are started anew where one dies or hangs."""
    (folder / f"{crew}.json").write_text(json.dumps(items))
    file = folder / f"{crew}.results"
    file.touch()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    while (done := _num_lines(file)) < len(items):
        command = [
            sys.executable,
            *(torchrun if num_ranks > 1 else []),
            __file__,
            "--work",
            str(folder),
            crew,
            str(done),
        ]
        with (folder / f"{crew}.log").open("w") as log:
            process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            why = _watch(process, file, len(items))
        finally:
            _end(process)
        if _num_lines(file) < len(items):
            family, mesh = items[_num_lines(file)]
            with file.open("a") as results:
                results.write(json.dumps(asdict(Result(family, mesh, False, reason=why))) + "\n")
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def _watch(process: "subprocess.Popen[bytes]", file: Path, num_items: int) -> str:
    """Waits until a crew is done; why it must be ended, if it is not."""
    done, since = _num_lines(file), time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if (now := _num_lines(file)) > done:
            done, since = now, time.monotonic()
        elif time.monotonic() - since > ITEM_TIMEOUT_S and done < num_items:
            return f"does not end within {ITEM_TIMEOUT_S:.0f} s"
    return f"the process ended with exit code {process.returncode}"


def _num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait()


def measure(families: Iterable[str] = FAMILIES) -> list[Result]:
    """All results of these families; those that cannot be built are left out."""
    families = [family for family in families if family not in NOT_BUILT]
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        with ThreadPoolExecutor() as pool:
            halves = [[(family, "1") for family in families[i::2]] for i in range(2)]
            alone = pool.map(lambda i: run_crew(folder, f"alone{i}", 1, halves[i]), range(2))
            results = [result for half in alone for result in half]
        refused = {result.family for result in results if result.refused}
        accepted = [family for family in families if family not in refused]
        items = [(family, mesh) for family in accepted for mesh in meshes_of(family)]
        results += run_crew(folder, "pair", 2, [item for item in items if item[1] not in ("1", "tp2×pp2")])
        results += run_crew(folder, "four", 4, [item for item in items if item[1] == "tp2×pp2"])
    return results


# ---- the document ----------------------------------------------------------------------------------------------------


def passing(results: Iterable[Result]) -> dict[str, list[str]]:
    """The families that pass, and on what: on all meshes but those of `OPTIONAL`, which may refuse them."""
    by_family: dict[str, list[Result]] = {}
    for result in results:
        by_family.setdefault(result.family, []).append(result)
    return {
        family: [mesh for mesh in MESHES if any(result.mesh == mesh and result.passed for result in tried)]
        for family, tried in sorted(by_family.items())
        if all(result.passed or (result.refused and result.mesh in OPTIONAL) for result in tried)
    }


def document(results: Sequence[Result]) -> str:
    good = passing(results)
    by_hand = sum(policy(family) == "hand-written" for family in good)
    lines = [
        "# Families",
        "",
        f"{len(good)} of the {len(FAMILIES)} families of causal language models in transformers pass: {by_hand} by",
        f"hand-written policies, {len(good) - by_hand} by the generic one. To pass is to generate, from a tiny random",
        "model in float32, the tokens that transformers generates, 24 for each of 6 prompts in one batch, on every",
        "mesh named. Written by `python tests/shared/parity.py`; `tests/families` holds it to what it says.",
        "",
        "| family | architecture | policy | passes on |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f} | {FAMILIES[f]} | {policy(f)} | {', '.join(meshes)} |" for f, meshes in good.items()]
    lines += ["", "## The others", "", "| family | architecture | policy | why not |", "|---|---|---|---|"]
    for family in sorted(FAMILIES.keys() - good.keys()):
        lines.append(f"| {family} | {FAMILIES[family]} | {policy(family)} | {_why_not(family, results)} |")
    return "\n".join(lines) + "\n"


def _why_not(family: str, results: Iterable[Result]) -> str:
    if family in NOT_BUILT:
        return f"not tried: {NOT_BUILT[family]}"
    tried = [result for result in results if result.family == family]
    passed = [mesh for mesh in MESHES if any(result.mesh == mesh and result.passed for result in tried)]
    reasons: dict[str, list[str]] = {}
    for result in tried:
        if not result.passed:
            reasons.setdefault(result.reason.replace("|", "\\|"), []).append(result.mesh)
    told = [reason if "1" in meshes else f"{', '.join(meshes)}: {reason}" for reason, meshes in reasons.items()]
    return "; ".join([*([f"passes on {', '.join(passed)}"] if passed else []), *told])


def main(families: Sequence[str]) -> None:
    results = measure(families or FAMILIES)
    if not families:
        DOCUMENT.write_text(document(results))
    for result in results:
        if not result.passed or result.faults or families:
            print(result.family, result.mesh, "passed" if result.passed else result.reason, *result.faults, sep=" | ")
    print(f"{len(passing(results))} families pass")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1:])
