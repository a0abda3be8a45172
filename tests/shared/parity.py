"""Every family by every policy on every mesh against transformers: `measure`.

Three crews of processes go through the families one after the other, each building its engine anew: two processes on
their own, which also make the models and their references; two ranks of torchrun; four ranks of torchrun. What takes a
process along, or hangs, is noted, and a new crew goes on with the next. This file is also what these processes run.
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
from meshlm.shardformer import checkpoint

MESHES: dict[str, dict[str, Any]] = {
    "1": {},
    "tp2": {"tp_size": 2},
    "tp2 of experts": {"tp_size": 2, "expert_parallel": True},
    "pp2": {"pp_size": 2},
    "tp2×pp2": {"tp_size": 2, "pp_size": 2},
}
OPTIONAL = ("tp2 of experts",)  # where a family's experts may be refused
HAND_WRITTEN, GENERIC = "hand-written", "generic"
CONFIG = {"dtype": "float32", "device": "cpu", "block_size": 4, "max_num_batched_tokens": 32, "num_kv_blocks": 128}
_TIMEOUT_S = 90.0  # for one item


def policy_of(family: str) -> str:
    """Whose layers a family runs with if nothing is asked for."""
    return HAND_WRITTEN if FAMILIES[family] in supported_architectures() else GENERIC


def meshes_of(family: str, policy: str) -> list[str]:
    """Those that a family is tried on; by a policy that is not its own, only the one that shows they agree."""
    if policy != policy_of(family):
        return ["1"]
    left_out = set()
    if policy == GENERIC:
        left_out.add("tp2×pp2")
    if not has_experts(family):
        left_out.add("tp2 of experts")
    return [mesh for mesh in MESHES if mesh not in left_out]


@dataclass(frozen=True)
class Item:
    """Something to try."""

    family: str
    policy: str
    mesh: str


@dataclass(frozen=True)
class Result(Item):
    """What became of it."""

    passed: bool = False
    refused: bool = False  # before anything was loaded
    reason: str = ""  # why it did not pass
    faults: list[str] = field(default_factory=list)  # of the reference: what keeps it from telling right from wrong


# ---- in a crew's processes -------------------------------------------------------------------------------------------


def work(folder: Path, crew: str, first: int) -> None:
    """Does a crew's items from the `first` on; rank 0 writes a line for each."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        import torch.distributed as dist

        dist.init_process_group("gloo")
    _look_through_once()
    for values in json.loads((folder / f"{crew}.json").read_text())[first:]:
        item = Item(**values)
        found = {"reason": ""} | attempt(folder, item)
        if int(os.environ.get("RANK", 0)) == 0:
            result = Result(**values, passed=not found["reason"], **found)
            with (folder / f"{crew}.results").open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def _look_through_once() -> None:
    """What a family's layers need is traced once in a process, not for each mesh anew."""
    read: Any = checkpoint.read_generic
    known: dict[tuple[Any, str], Any] = {}

    def read_once(config: Any, model_class: Any) -> Any:
        key = (model_class, config.to_json_string())
        if key not in known:
            known[key] = read(config, model_class)
        return known[key]

    checkpoint.read_generic = read_once


def attempt(folder: Path, item: Item) -> dict[str, Any]:
    """What a Result says of an item; makes model and reference where they are not there yet."""
    path, reference = folder / item.family, folder / f"{item.family}.json"
    if not path.exists():
        tiny_model(item.family).save_pretrained(path)
    policy = {} if item.policy == policy_of(item.family) else {"policy": item.policy}
    try:
        engine = InferenceEngine(path, InferenceConfig(**CONFIG, **MESHES[item.mesh], **policy))
    except Exception as error:
        return {"refused": isinstance(error, ValueError), "reason": _one_line(error, folder)}
    faults: list[str] = []
    with engine:
        if not reference.exists():
            made = greedy_reference(tiny_model(item.family))
            reference.write_text(json.dumps(asdict(made)))
            faults = made.faults()
        expected = json.loads(reference.read_text())
        params = {"temperature": 0, "max_tokens": len(expected["outputs"][0]), "ignore_eos": True, "detokenize": False}
        try:
            outputs = engine.generate(expected["prompts"], params, progress=False)
        except Exception as error:
            return {"reason": _one_line(error, folder), "faults": faults}
    differing = [
        f"prompt of {len(prompt)} tokens from output token {_first_difference(output.token_ids, wanted)} on"
        for prompt, output, wanted in zip(expected["prompts"], outputs, expected["outputs"], strict=True)
        if list(output.token_ids) != wanted
    ]
    return {"reason": f"differs from transformers: {'; '.join(differing)}" if differing else "", "faults": faults}


def _first_difference(got: Sequence[int], wanted: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(got, wanted, strict=False)) if pair[0] != pair[1]), len(got))


def _one_line(error: Exception, folder: Path) -> str:
    """What stands before a list of all that is supported; of a traceback its end."""
    lines = [line.strip() for line in str(error).replace(f"{folder}/", "").splitlines() if line.strip()]
    if isinstance(error, ValueError):
        return re.split("; (nearest )?supported", " ".join(lines))[0]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


# ---- crews -----------------------------------------------------------------------------------------------------------


def measure(families: Iterable[str] = FAMILIES) -> list[Result]:
    """All results of these families; those that cannot be built are left out."""
    families = [family for family in families if family not in NOT_BUILT]
    with tempfile.TemporaryDirectory(prefix="parity-") as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        pairs = [(family, policy) for family in families for policy in dict.fromkeys((policy_of(family), GENERIC))]
        halves = [[Item(*pair, "1") for pair in pairs if pair[0] in families[i::2]] for i in range(2)]
        alone = pool.map(lambda i: _run_crew(folder, f"alone{i}", 1, halves[i]), range(2))
        results = [result for half in alone for result in half]
        refused = {(result.family, result.policy) for result in results if result.refused}
        items = [Item(*pair, mesh) for pair in pairs if pair not in refused for mesh in meshes_of(*pair)]
        results += _run_crew(folder, "pair", 2, [item for item in items if item.mesh not in ("1", "tp2×pp2")])
        results += _run_crew(folder, "four", 4, [item for item in items if item.mesh == "tp2×pp2"])
    return results


def _run_crew(folder: Path, crew: str, num_ranks: int, items: Sequence[Item]) -> list[Result]:
    """Results of items, in order, by processes that are started anew where one dies or hangs."""
    (folder / f"{crew}.json").write_text(json.dumps([asdict(item) for item in items]))
    file = folder / f"{crew}.results"
    file.touch()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    while (done := _num_lines(file)) < len(items):
        command = [sys.executable, *(torchrun if num_ranks > 1 else []), __file__, str(folder), crew, str(done)]
        with (folder / f"{crew}.log").open("w") as log:
            process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            why = _watch(process, file, len(items))
        finally:
            _end(process)
        if (done := _num_lines(file)) < len(items):
            with file.open("a") as results:
                results.write(json.dumps(asdict(Result(**asdict(items[done]), reason=why))) + "\n")
    return [Result(**json.loads(line)) for line in file.read_text().splitlines()]


def _watch(process: "subprocess.Popen[bytes]", file: Path, num_items: int) -> str:
    """Waits until a crew is done; why it must be ended, if it is not."""
    done, since = _num_lines(file), time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if (now := _num_lines(file)) > done:
            done, since = now, time.monotonic()
        elif time.monotonic() - since > _TIMEOUT_S and done < num_items:
            return f"does not end within {_TIMEOUT_S:.0f} s"
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


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
