"""How near does each kernel come to what the device can do, and how does it compare with eager and torch's own?

The shapes are those of an 8B Llama: hidden size 4096, 32 query heads and 8 KV heads of 128, intermediate size 14336,
vocabulary 128256; weights and activations in bfloat16, logits in float32.

    rows      norms, activations, rotary embedding with the KV store, embedding, sampling: 4096 tokens (of sampling, 256
              too: a row is a sequence there)
    decode    paged attention of one query a sequence, the blocks of a sequence lying anywhere in the cache
    prefill   paged attention of one whole prompt

    us        microseconds of a call: the median of rounds, in each of which several calls on data of their own follow
              each other, since caches would hold the data of one (`measuring.Clock`). The host's time does not count
    rate      GB/s, where memory is the limit: bytes that the formula must read and write, each once, the keys and
              values alone for decode; TFLOP/s for prefill: two products, of the keys that the mask leaves
    of limit  the rate's share of the device's own, measured in the same run: that of copying 1 GiB (read and written
              both counted), or for prefill of a product of two bfloat16 matrices of 8192 x 8192
    x eager   how many times as fast as `kernels/eager.py`
    x flash   how many times as fast as FlashAttention in torch's scaled_dot_product_attention, which gets the same keys
              and values side by side, without blocks
    best      the fastest of all peers, with how many times as fast we are: scaled_dot_product_attention by its kinds
              (flash, cudnn, efficient), and flash_attn (2), flash_attn_interface (3), flash_attn.cute (4) where they
              can be imported; "-": none of them runs such a shape here
    target    what the column that it names must reach, and whether it does. Exit code 1 if one is missed on a GPU

Targets: norms, rotary embedding and activations 85 % of the limit; decode 80 % of it from 4096 keys up; prefill 0.6 x
flash. On a CPU, and with --toy, sizes are tiny, so that a run shows that the script works; no target is judged then.
Results go to docs/results, as JSON and as the table in text; of a toy run only if --out says where.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --only decode prefill --out /tmp/results
    python benchmarks/kernels.py --toy --device cpu --implementation triton    # in Triton's interpreter
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    RESULTS,
    Call,
    Clock,
    choose_device,
    copy_bandwidth,
    format_table,
    heading,
    matmul_rate,
    randn,
    reason,
    result_stem,
    where_and_when,
    write_results,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meshlm.kernels import Ops, select_ops
from meshlm.kernels.ops import EAGER
from meshlm.shardformer.backends import AttentionSpec, Sequences, auto_backend, create_backend

ROWS_TARGET, DECODE_TARGET, PREFILL_TARGET = 0.85, 0.80, 0.60
DECODE_TARGET_FROM = 4096  # keys
GROUPS = ("rows", "decode", "prefill")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and how much of it is measured."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tokens: int  # of the rows
    samples: tuple[int, ...]  # rows of logits
    batches: tuple[int, ...]  # of decode
    contexts: tuple[int, ...]  # keys of each sequence in decode
    prompts: tuple[int, ...]  # of prefill


LLAMA_8B = Shape(
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
    tokens=4096,
    samples=(4096, 256),
    batches=(1, 8, 64, 256),
    contexts=(1024, 2048, 4096, 8192, 16384, 32768),
    prompts=(2048, 8192, 32768),
)
TOY = Shape(
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=96,
    vocab=500,
    tokens=8,
    samples=(4,),
    batches=(1, 3),
    contexts=(32, 70),
    prompts=(40,),
)


@dataclass(frozen=True)
class Row:
    """One kernel on one shape; rates in bytes or FLOP a second."""

    group: str
    kernel: str
    shape: str
    unit: str  # GB/s or TFLOP/s
    work: float  # bytes or FLOP of a call
    seconds: float | None = None  # None: it failed, `failures` says why
    of_limit: float | None = None
    peers: dict[str, float] = field(default_factory=dict)  # "eager" and torch's own -> seconds
    failures: dict[str, str] = field(default_factory=dict)  # who -> why not
    target: tuple[str, float] | None = None  # column, value

    @property
    def rate(self) -> float | None:
        return None if self.seconds is None else self.work / self.seconds

    def times(self, peer: str) -> float | None:
        """How many times as fast as a peer."""
        return self.peers[peer] / self.seconds if self.seconds is not None and peer in self.peers else None

    @property
    def best(self) -> str | None:
        others = [peer for peer in self.peers if peer != "eager"]
        return min(others, key=self.peers.__getitem__, default=None)

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet, or nothing to compare with."""
        if self.target is None:
            return None
        column, value = self.target
        reached = self.of_limit if column == "of limit" else self.times("flash")
        if reached is None:
            return None if self.seconds is not None else False
        return reached >= value


class Bench:
    """What the measurements have in common."""

    def __init__(self, shape: Shape, device: torch.device, toy: bool, implementation: str, block_size: int) -> None:
        self.shape, self.device, self.block_size = shape, device, block_size
        self.clock = Clock(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.randn = partial(randn, dtype=self.dtype, device=device)
        self.ops = _triton_ops() if implementation == "triton" else select_ops(device, self.dtype)
        self.spec = AttentionSpec(
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            dtype=self.dtype,
            device=device,
        )
        self.backend_name = "triton" if implementation == "triton" else auto_backend(self.spec)
        self.copy_rate = copy_bandwidth(self.clock, toy)
        self.matmul_rate = matmul_rate(self.clock, self.dtype, toy)

    def measure(
        self, row: dict[str, Any], ours: Callable[[], list[Call]], peers: dict[str, Callable[[], list[Call]]]
    ) -> Row:
        """Times us and the peers, each on what its function prepares: one call for each set of data."""
        limit = self.copy_rate if row["unit"] == "GB/s" else self.matmul_rate
        times: dict[str, float] = {}
        failures = {}
        for name, prepare in {"ours": ours, **peers}.items():
            try:
                times[name] = self.clock.seconds(*prepare())
            except Exception as error:  # a peer has its limits, and what fails here must not end the run
                failures[name] = reason(error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        seconds = times.pop("ours", None)
        of_limit = None if seconds is None else row["work"] / seconds / limit
        return Row(**row, seconds=seconds, of_limit=of_limit, peers=times, failures=failures)


def _triton_ops() -> Ops:
    from meshlm.kernels.triton_ops import TRITON

    return TRITON


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows(bench: Bench) -> Iterator[Row]:
    """The kernels that memory limits."""
    shape, size, tokens = bench.shape, bench.dtype.itemsize, bench.shape.tokens
    hidden, kv_dim = shape.hidden, shape.kv_heads * shape.head_dim
    qkv_heads = shape.heads + 2 * shape.kv_heads
    weight, bias = bench.randn(hidden), bench.randn(hidden)
    table = bench.randn(shape.vocab, hidden)
    cos, sin = bench.randn(tokens, shape.head_dim // 2), bench.randn(tokens, shape.head_dim // 2)
    positions = torch.randperm(tokens, device=bench.device)
    num_blocks = -(-tokens // bench.block_size)
    cache_shape = (num_blocks, bench.block_size, shape.kv_heads, shape.head_dim)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)

    def x() -> Tensor:
        return bench.randn(tokens, hidden)

    def rms_norm(ops: Ops) -> Call:
        return partial(ops.rms_norm, x(), weight, 1e-5)

    def add_rms_norm(ops: Ops) -> Call:
        return partial(ops.add_rms_norm, x(), x(), weight, 1e-5)

    def add_layer_norm(ops: Ops) -> Call:
        return partial(ops.add_layer_norm, x(), x(), weight, bias, 1e-5)

    def rotary_store_kv(ops: Ops) -> Call:
        query, key, value = bench.randn(tokens, qkv_heads, shape.head_dim).split(heads, dim=1)
        caches = bench.randn(*cache_shape), bench.randn(*cache_shape)
        slots = torch.randperm(num_blocks * bench.block_size, device=bench.device)[:tokens]
        return partial(ops.rotary_store_kv, query, key, value, cos, sin, positions, *caches, slots)

    def gated_activation(kind: str, ops: Ops) -> Call:
        return partial(ops.gated_activation(kind), bench.randn(tokens, 2 * shape.intermediate))

    def activation(kind: str, ops: Ops) -> Call:
        return partial(ops.activation(kind), bench.randn(tokens, shape.intermediate))

    def embedding(ops: Ops) -> Call:
        return partial(ops.embedding, torch.randint(shape.vocab, (tokens,), device=bench.device), table, 0)

    def sample(num_rows: int, temperature: float, ops: Ops) -> Call:
        logits = torch.randn(num_rows, shape.vocab, device=bench.device)
        keys = torch.randint(-(2**31), 2**31 - 1, (num_rows, 2), dtype=torch.int32, device=bench.device)
        return partial(ops.sample_shard, logits, torch.full((num_rows,), temperature, device=bench.device), keys, 0)

    width = f"{tokens} x"
    elements, activated = tokens * hidden, tokens * shape.intermediate
    rotated = 2 * tokens * (qkv_heads * shape.head_dim + shape.head_dim // 2) * size + 16 * tokens
    kernels: list[tuple[str, str, float, Callable[[Ops], Call], bool]] = [  # name, shape, bytes, call, has target
        ("rms_norm", f"{width} {hidden}", (2 * elements + hidden) * size, rms_norm, True),
        ("add_rms_norm", f"{width} {hidden}", (4 * elements + hidden) * size, add_rms_norm, True),
        ("add_layer_norm", f"{width} {hidden}", (4 * elements + 2 * hidden) * size, add_layer_norm, True),
        (
            "rotary_store_kv",
            f"{width} ({shape.heads} + 2 * {kv_dim // shape.head_dim})",
            rotated,
            rotary_store_kv,
            True,
        ),
        ("embedding", f"{width} {hidden}", 2 * elements * size + 8 * tokens, embedding, False),
    ]
    for kind in ("silu", "gelu", "gelu_tanh", "swiglu_oai"):
        gated = partial(gated_activation, kind)
        kernels.append((f"{kind}, gated", f"{width} {shape.intermediate}", 3 * activated * size, gated, True))
    alone = partial(activation, "gelu_tanh")
    kernels.append(("gelu_tanh", f"{width} {shape.intermediate}", 2 * activated * size, alone, True))
    for num_rows in shape.samples:
        for kind, temperature in (("greedy", 0.0), ("drawn", 0.6)):
            work = float((4 * shape.vocab + 24) * num_rows)
            kernels.append(
                (f"sample {kind}", f"{num_rows} x {shape.vocab}", work, partial(sample, num_rows, temperature), False)
            )
    for kernel, dims, work, call, has_target in kernels:
        target = ("of limit", ROWS_TARGET) if has_target else None
        row: dict[str, Any] = {
            "group": "rows",
            "kernel": kernel,
            "shape": dims,
            "unit": "GB/s",
            "work": work,
            "target": target,
        }
        sets = bench.clock.num_sets(work)

        def calls(ops: Ops, call: Callable[[Ops], Call] = call, sets: int = sets) -> list[Call]:
            return [call(ops) for _ in range(sets)]

        yield bench.measure(row, partial(calls, bench.ops), {"eager": partial(calls, EAGER)})


# ---- attention ------------------------------------------------------------------------------------------------------


class Cache:
    """A paged cache of random keys and values, of which each set of sequences takes blocks of its own, or all."""

    def __init__(self, bench: Bench, num_tokens: int) -> None:
        self.bench, shape = bench, bench.shape
        self.num_blocks = -(-num_tokens // bench.block_size)
        dims = (self.num_blocks, bench.block_size, shape.kv_heads, shape.head_dim)
        self.key, self.value = bench.randn(*dims), bench.randn(*dims)
        self.order = torch.randperm(self.num_blocks).tolist()

    def num_sets(self, batch: int, context: int, num_bytes: float) -> int:
        """Sets of so many sequences whose blocks exceed the device's caches together, where there are so many."""
        return min(self.bench.clock.num_sets(num_bytes), self.num_blocks // (batch * self._blocks(context)))

    def paged(self, backend_name: str, batch: int, queries: int, context: int, sets: int) -> list[Call]:
        """Attention of the last queries of each sequence, by a backend."""
        bench, each = self.bench, self._blocks(context)
        backend = create_backend(backend_name, bench.spec)
        calls: list[Call] = []
        for index in range(sets):
            blocks = iter(self.order[index * batch * each : (index + 1) * batch * each])
            tables = [[next(blocks) for _ in range(each)] for _ in range(batch)]
            sequences = Sequences.of([queries] * batch, [context] * batch, tables, bench.block_size, bench.spec.device)
            plan = backend.prepare(sequences)
            query = bench.randn(batch * queries, bench.shape.heads, bench.shape.head_dim)
            calls.append(partial(backend.forward, query, self.key, self.value, plan))
        return calls

    def plain(self, attend: "Attend", batch: int, queries: int, context: int, sets: int) -> list[Call]:
        """The same by a function that takes keys and values side by side: as many of them, read where they lie."""
        bench, calls = self.bench, list[Call]()
        for index in range(sets):
            start, stop = index * batch * context, (index + 1) * batch * context
            key, value = (
                cache.flatten(0, 1)[start:stop].unflatten(0, (batch, context)) for cache in (self.key, self.value)
            )
            query = bench.randn(batch, queries, bench.shape.heads, bench.shape.head_dim)
            calls.append(partial(attend, query, key, value))
        return calls

    def _blocks(self, context: int) -> int:
        return -(-context // self.bench.block_size)


Attend = Callable[[Tensor, Tensor, Tensor], Any]
"""query [batch, queries, heads, head_dim], key and value [batch, context, kv_heads, head_dim]; causal, to the last."""


def _sdpa(kind: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel([kind]):
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=query.shape[1] > 1,
            enable_gqa=True,
        )


def _library(module: str, query: Tensor, key: Tensor, value: Tensor) -> Any:
    return importlib.import_module(module).flash_attn_func(query, key, value, causal=True)


PEERS: dict[str, Attend] = {
    "flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flash_attn": partial(_library, "flash_attn"),
    "flash_attn_interface": partial(_library, "flash_attn_interface"),
    "flash_attn.cute": partial(_library, "flash_attn.cute"),
}


def attention(
    bench: Bench, cache: Cache, row: dict[str, Any], batch: int, queries: int, context: int, sets: int
) -> Row:
    peers: dict[str, Callable[[], list[Call]]] = {"eager": partial(cache.paged, "eager", batch, queries, context, sets)}
    for name, attend in PEERS.items():
        peers[name] = partial(cache.plain, attend, batch, queries, context, sets)
    return bench.measure(row, partial(cache.paged, bench.backend_name, batch, queries, context, sets), peers)


def decode(bench: Bench) -> Iterator[Row]:
    """Paged attention of one query a sequence."""
    shape = bench.shape
    per_token = 2 * shape.kv_heads * shape.head_dim * bench.dtype.itemsize
    cases = [(batch, context) for batch in shape.batches for context in shape.contexts]
    room = _room(bench) // per_token
    fitting = [case for case in cases if case[0] * case[1] <= room]
    most = max((batch * _ceil(context, bench.block_size) for batch, context in fitting), default=1)
    cache = Cache(bench, max(most, min(room, 2 * bench.clock.cache_bytes // per_token)))
    for batch, context in cases:
        work = batch * context * per_token
        row: dict[str, Any] = {
            "group": "decode",
            "kernel": "paged decode",
            "shape": f"{batch} x {context}",
            "unit": "GB/s",
            "work": work,
            "target": ("of limit", DECODE_TARGET) if context >= DECODE_TARGET_FROM else None,
        }
        if (batch, context) not in fitting:
            need = f"its cache of {work / 2**30:.0f} GiB is more than 40 % of the free memory"
            yield Row(**(row | {"target": None}), failures={"ours": need})
            continue
        yield attention(bench, cache, row, batch, 1, context, cache.num_sets(batch, context, work))


def prefill(bench: Bench) -> Iterator[Row]:
    """Paged attention of one whole prompt."""
    shape = bench.shape
    cache = Cache(bench, max(shape.prompts))
    for length in shape.prompts:
        row: dict[str, Any] = {
            "group": "prefill",
            "kernel": "paged prefill",
            "shape": f"1 x {length}",
            "unit": "TFLOP/s",
            "work": 4 * shape.heads * shape.head_dim * (length * (length + 1) // 2),
            "target": ("x flash", PREFILL_TARGET),
        }
        yield attention(bench, cache, row, 1, length, length, 1)


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _room(bench: Bench) -> int:
    """Bytes that the cache may take: eager copies all of it."""
    if bench.device.type != "cuda":
        return 2**24
    return int(0.4 * torch.cuda.mem_get_info(bench.device)[0])


MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {"rows": rows, "decode": decode, "prefill": prefill}


# ---- what is printed ------------------------------------------------------------------------------------------------


def table(results: list[Row], judged: bool) -> list[str]:
    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    cells = []
    for row in results:
        scale = 1e9 if row.unit == "GB/s" else 1e12
        target = ""
        if row.seconds is None:
            target = row.failures["ours"]
        elif row.target is not None and judged:
            column, value = row.target
            wanted = f"{value:.0%}" if column == "of limit" else f"{value:.2f} {column}"
            target = f"{wanted}: {'no peer' if row.met is None else 'ok' if row.met else 'MISSED'}"
        best = row.best
        cells.append(
            [
                row.kernel,
                row.shape,
                "-" if row.seconds is None else f"{row.seconds * 1e6:.1f}",
                "-" if row.rate is None else f"{row.rate / scale:.4g} {row.unit}",
                "-" if row.of_limit is None else f"{row.of_limit:.1%}",
                times(row.times("eager")),
                times(row.times("flash")),
                "-" if best is None else f"{best} {times(row.times(best))}",
                target,
            ]
        )
    columns = ["kernel", "shape", "us", "rate", "of limit", "x eager", "x flash", "best", "target"]
    return format_table(columns, cells, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes (always on a CPU)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu")
    parser.add_argument("--implementation", choices=["auto", "triton"], default="auto", help="auto: what engines bind")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: docs/results, or none for a toy run)"
    )
    args = parser.parse_args()
    device = choose_device(args.device)
    toy = args.toy or device.type != "cuda"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif args.implementation == "triton":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    where = where_and_when(device)
    print("\n".join(heading(where)), flush=True)

    torch.manual_seed(0)
    with torch.inference_mode():
        bench = Bench(TOY if toy else LLAMA_8B, device, toy, args.implementation, args.block_size)
        limits = f"copy {bench.copy_rate / 1e9:.4g} GB/s, matmul {bench.matmul_rate / 1e12:.4g} TFLOP/s"
        bound = f"ops {bench.ops.name}; attention {bench.backend_name}, blocks of {bench.block_size}; {bench.dtype}"
        print(f"measured limits: {limits}\n{bound}", flush=True)
        results: list[Row] = []
        for group in args.only:
            try:
                for row in MEASUREMENTS[group](bench):
                    results.append(row)
                    rate = "failed" if row.seconds is None else f"{row.seconds * 1e6:.1f} us"
                    print(f"  {row.kernel} {row.shape}: {rate}", flush=True)
            except Exception as error:  # after an illegal access nothing works; what there is, is kept
                print(f"  {group}: FAILED: {reason(error)}", flush=True)

    judged = not toy
    missed = [row for row in results if row.met is False]
    lines = [*heading(where), f"measured limits: {limits}", bound, "", *table(results, judged)]
    if judged:
        num_judged = sum(row.met is not None for row in results)
        lines.append(f"targets: {num_judged - len(missed)} of {num_judged} met")
    else:
        lines.append("toy sizes: targets are not judged")
    out = args.out or (None if toy else RESULTS)
    if out is not None:
        result = {
            **where,
            "toy": toy,
            "ops": bench.ops.name,
            "attention": bench.backend_name,
            "block_size": bench.block_size,
            "dtype": str(bench.dtype),
            "copy_bytes_per_s": bench.copy_rate,
            "matmul_flop_per_s": bench.matmul_rate,
            "met": not missed if judged else None,
            "rows": [asdict(row) | {"met": row.met if judged else None} for row in results],
        }
        print(f"written: {write_results(out, result_stem('kernels', where), result, lines)}")
    print("\n" + "\n".join(lines))
    return 1 if judged and missed else 0


if __name__ == "__main__":
    sys.exit(main())
