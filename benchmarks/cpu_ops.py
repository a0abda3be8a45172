"""How near do the C++ ops between the linear layers come to what the processor can do?

Sizes are the demo model's: hidden size 576, 9 query heads and 3 KV heads of 64, intermediate size 1536. Attention reads
blocks of 16 tokens in random order, as many caches one after the other as no cache of the processor holds.

    us        microseconds of a call: the median of rounds
    rate      GFLOP/s for prompts: two products, of the keys that the mask leaves; GB/s else: bytes that the formula
              must read and write, each once; of a decode those of keys and values alone
    of limit  its share of what the same run measures: torch's product of 1024 x 1024 matrices; reading 256 MiB of
              huge pages. What fits the processor's caches can be above 1
    x torch   for attention, how many times as fast as scaled_dot_product_attention, which gets the keys and values of
              each sequence side by side, without blocks; of a batch, one call a sequence

    python benchmarks/cpu_ops.py
    python benchmarks/cpu_ops.py --dtype float32 --rounds 30
"""

import argparse
import mmap
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import format_table, heading, where_and_when
from torch import Tensor

from meshlm.kernels.batch import PagedBatch
from meshlm.kernels.cpu import CpuOps

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, BLOCK = 576, 9, 3, 64, 1536, 16
CPU = torch.device("cpu")
COLD_BYTES = 192 << 20  # of caches in turn: several times what the last level holds

Call = Callable[[], Any]
BATCHES = {  # query_lens, key_lens
    "prompt of 128": ([128], [128]),
    "prompt of 1024": ([1024], [1024]),
    "chunk of 512 after 1536": ([512], [2048]),
    "decode, 1 of 192": ([1], [192]),
    "decode, 1 of 4096": ([1], [4096]),
    "decode, 32 of 100-534": ([1] * 32, list(range(100, 548, 14))),
}


def huge_pages(*shape: int, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape).normal_()


class Clock:
    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def seconds(self, calls: list[Call]) -> float:
        times = []
        for _ in range(self.rounds + 1):
            started = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - started) / len(calls))
        return statistics.median(times[1:])  # the first warms up


def torchs(query: Tensor, cache: Tensor, query_lens: list[int], key_lens: list[int]) -> None:
    """Attention of each sequence to the first keys of the cache, whatever they are."""
    flat, start = cache.view(2, 1, -1, KV_HEADS, HEAD_DIM).transpose(2, 3), 0
    for q, k in zip(query_lens, key_lens, strict=True):
        rows, (key, value) = query[start : start + q].transpose(0, 1)[None], flat[:, :, :, :k]
        mask = None if q in (1, k) else torch.ones(q, k, dtype=torch.bool).tril(k - q)
        F.scaled_dot_product_attention(rows, key, value, mask, is_causal=q == k > 1, enable_gqa=True)
        start += q


def attention(ops: CpuOps, dtype: torch.dtype, clock: Clock) -> Iterator[tuple[str, float, float, bool, float]]:
    """Name, seconds, work, whether that is FLOP, seconds of torch's."""
    for name, (query_lens, key_lens) in BATCHES.items():
        counts = [-(-length // BLOCK) for length in key_lens]
        ids = random.Random(0).sample(range(sum(counts)), sum(counts))
        tables = [[ids.pop() for _ in range(count)] for count in counts]
        batch = PagedBatch.of(query_lens, key_lens, tables, BLOCK, CPU)
        query = torch.randn(sum(query_lens), HEADS, HEAD_DIM).to(dtype)
        size = 2 * sum(key_lens) * KV_HEADS * HEAD_DIM * dtype.itemsize
        shape = (2, sum(counts), BLOCK, KV_HEADS, HEAD_DIM)
        caches = [huge_pages(*shape, dtype=dtype) for _ in range(min(60, COLD_BYTES // size + 1))]
        ours: list[Call] = [partial(ops.paged_attention, query, cache[0], cache[1], batch, 0.125) for cache in caches]
        theirs: list[Call] = [partial(torchs, query, cache, query_lens, key_lens) for cache in caches]
        is_flop = max(query_lens) > 1
        pairs = sum(q * (k - q) + q * (q + 1) / 2 for q, k in zip(query_lens, key_lens, strict=True))
        work = 4 * pairs * HEADS * HEAD_DIM if is_flop else size
        yield name, clock.seconds(ours), work, is_flop, clock.seconds(theirs)


def rows(ops: CpuOps, dtype: torch.dtype, clock: Clock) -> Iterator[tuple[str, float, float]]:
    """Name, seconds, bytes."""
    swiglu = ops.gated_activation("silu")
    for n in (1, 32, 1024):
        up, x, residual = (torch.randn(n, size).to(dtype) for size in (2 * INTERMEDIATE, HIDDEN, HIDDEN))
        weight, table = torch.randn(HIDDEN).to(dtype), torch.randn(2, 1024, HEAD_DIM // 2).to(dtype)
        qkv = torch.randn(n, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
        query, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        caches = torch.zeros(2, 1024 // BLOCK, BLOCK, KV_HEADS, HEAD_DIM, dtype=dtype)
        places = torch.arange(n)
        calls: dict[str, tuple[int, Call]] = {
            "SwiGLU": (3 * INTERMEDIATE, partial(swiglu, up)),
            "norm + residual": (4 * HIDDEN, partial(ops.add_rms_norm, x, residual, weight, 1e-5)),
            "rotary + store": (
                2 * (HEADS + 2 * KV_HEADS) * HEAD_DIM,
                partial(
                    ops.rotary_store_kv, query, key, value, table[0], table[1], places, caches[0], caches[1], places
                ),
            ),
        }
        for name, (elements, call) in calls.items():
            yield f"{name}, {n} tokens", clock.seconds([call] * 20), n * elements * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    clock, table = Clock(args.rounds), []
    memory = huge_pages(64 << 20, dtype=torch.float32)
    bandwidth = memory.numel() * 4 / clock.seconds([memory.sum])
    for name in args.dtype:
        dtype = getattr(torch, name)
        ops, (a, b) = CpuOps(dtype), torch.randn(2, 1024, 1024).to(dtype)
        product = 2 * 1024**3 / clock.seconds([partial(torch.mm, a, b)])
        for op, seconds, work, is_flop, torchs in attention(ops, dtype, clock):
            limit, unit = (product, "GFLOP/s") if is_flop else (bandwidth, "GB/s")
            rate = f"{work / seconds / 1e9:.1f}"
            share, ratio = f"{work / seconds / limit:.2f}", f"{torchs / seconds:.2f}"
            table.append([name, op, f"{seconds * 1e6:.1f}", rate, share, ratio, unit])
        for op, seconds, size in rows(ops, dtype, clock):
            rate, share = f"{size / seconds / 1e9:.1f}", f"{size / seconds / bandwidth:.2f}"
            table.append([name, op, f"{seconds * 1e6:.1f}", rate, share, "-", "GB/s"])
        table.append([name, "the product", "-", f"{product / 1e9:.1f}", "1.00", "-", "GFLOP/s"])
    table.append(["-", "reading memory", "-", f"{bandwidth / 1e9:.1f}", "1.00", "-", "GB/s"])
    print("\n".join(heading(where_and_when(CPU))))
    print("\n".join(format_table(["dtype", "op", "us", "rate", "of limit", "x torch", "unit"], table, 2)))


if __name__ == "__main__":
    main()
