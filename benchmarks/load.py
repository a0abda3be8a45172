"""Does a rank read and hold its own share of the weights only?

Makes a Llama checkpoint of random bfloat16 weights (at least 2 GB, several safetensors files), loads it on several
meshes, and prints for each rank

    share   bytes of the weights that it holds
    read    bytes that it read from the checkpoint's files; target: at most 1.05 x share
    growth  peak resident memory after loading less resident memory before; target: at most 1.15 x share

and for each mesh what all ranks of a replica hold together, against the checkpoint: a rank that held everything would
be true to its share, too; target: at most 1.05 x. The KV cache is allocated after the peak is taken. Each mesh runs in
a fresh process, the checkpoint is made in another. Exit code 1 if a target is missed.

    python benchmarks/load.py
    python benchmarks/load.py --mesh tp2 --mesh pp2xtp2 --directory /tmp/checkpoint    # kept, and used again
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

MESHES = ["tp1", "tp2", "pp2", "pp2xtp2", "tp3"]  # 8 KV heads on 3 ranks: an uneven split
MAX_GROWTH, MAX_READ, MAX_TOGETHER = 1.15, 1.05, 1.05  # times the share; times the checkpoint
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mesh", action="append", help=f"such as pp2xtp2 (default: {', '.join(MESHES)})")
    parser.add_argument("--layers", type=int, default=16, help="16 make 2.2 GB; 122 MB each")
    parser.add_argument("--directory", type=Path, help="where to make the checkpoint and leave it (default: removed)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "ARGUMENT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, argument = args.worker
        result = make_checkpoint(args.directory, int(argument)) if what == "make" else load(args.directory, argument)
        print(json.dumps(result))
        return 0
    with ExitStack() as stack:
        directory = args.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlm-load-")))
        if not (directory / "config.json").exists():  # written last
            in_child(directory, "make", str(args.layers))
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        results = []
        for mesh in args.mesh or MESHES:
            results.append({"mesh": mesh, **judge(in_child(directory, "load", mesh), size)})
            if not args.json:
                print_table(results[-1], size)
    if args.json:
        print(json.dumps({"checkpoint_bytes": size, "meshes": results}, indent=2))
    return 0 if all(result["met"] for result in results) else 1


def in_child(directory: Path, what: str, argument: str) -> Any:
    """Runs a part in a process of its own, whose memory holds nothing else; its result."""
    command = [sys.executable, __file__, "--directory", str(directory), "--worker", what, argument]
    result = subprocess.run(command, stdout=subprocess.PIPE)
    if result.returncode != 0:
        sys.exit(result.returncode)  # it has told why
    return json.loads(result.stdout.splitlines()[-1])


def make_checkpoint(directory: Path, num_layers: int) -> None:
    """A file for the embedding and head and one for every two layers; one file's tensors are in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from meshlm.policies import find_policy
    from meshlm.shardformer.checkpoint import read_rotary

    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        num_hidden_layers=num_layers,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    spec = find_policy(config.architectures).spec(config, read_rotary)
    files: dict[str, list[tuple[str, list[int]]]] = {}
    for name, shape in spec.shapes().items():
        layer = re.match(rf"{re.escape(spec.prefix)}\.(\d+)\.", name)
        file = f"model-layers-{int(layer[1]) // 2:02}.safetensors" if layer else "model-vocabulary.safetensors"
        files.setdefault(file, []).append((name, list(shape)))
    torch.manual_seed(0)
    for file, tensors in files.items():
        save_file({name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in tensors}, directory / file)
    weight_map = {name: file for file, tensors in files.items() for name, _ in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)


def load(directory: Path, mesh: str) -> list[dict[str, Any]]:
    """What each rank of a mesh says after loading."""
    from meshlm import InferenceConfig, InferenceEngine

    sizes: Any = {f"{axis}_size": int(size) for axis, size in re.findall(r"(dp|pp|tp)(\d+)", mesh)}
    with InferenceEngine(directory, InferenceConfig(**sizes, device="cpu", num_kv_blocks=2)) as engine:
        return [asdict(rank) for rank in engine.ranks]


def judge(ranks: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """The figures of a mesh and whether they meet the targets."""
    rows = []
    for rank in ranks:
        share, read = rank["weight_bytes"], rank["bytes_read"]
        growth = rank["peak_rss_bytes"] - rank["baseline_rss_bytes"]
        met = growth <= MAX_GROWTH * share and read <= MAX_READ * share
        rows.append(
            {key: rank[key] for key in ("rank", "coordinate", "baseline_rss_bytes", "peak_rss_bytes", "load_s")}
            | {"share_bytes": share, "read_bytes": read, "growth_bytes": growth, "met": met}
        )
    replicas = 1 + max(rank["coordinate"]["dp"] for rank in ranks)
    together = sum(rank["weight_bytes"] for rank in ranks) / replicas
    met = together <= MAX_TOGETHER * size and all(row["met"] for row in rows)
    return {"ranks": rows, "together_bytes": together, "met": met}


def print_table(result: dict[str, Any], size: int) -> None:
    together = result["together_bytes"]
    print(f"{result['mesh']}: checkpoint {size / MIB:.0f} MiB, all ranks together {together / size:.3f} x that")
    print("  rank  (dp, pp, tp)  share MiB   read MiB  ratio  before MiB  peak MiB  growth MiB  ratio  load s")
    for row in result["ranks"]:
        share, read, growth = row["share_bytes"], row["read_bytes"], row["growth_bytes"]
        print(
            f"  {row['rank']:>4}  {tuple(row['coordinate'].values())!s:12}  {share / MIB:>9.1f}  {read / MIB:>9.1f}  "
            f"{read / share:>5.3f}  {row['baseline_rss_bytes'] / MIB:>10.1f}  {row['peak_rss_bytes'] / MIB:>8.1f}  "
            f"{growth / MIB:>10.1f}  {growth / share:>5.3f}  {row['load_s']:>6.1f}" + ("" if row["met"] else "  MISSED")
        )
    targets = f"read <= {MAX_READ} x share, growth <= {MAX_GROWTH} x share, together <= {MAX_TOGETHER} x checkpoint"
    print(f"  {'met' if result['met'] else 'MISSED'}: {targets}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
