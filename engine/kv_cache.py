"""This rank's paged KV cache: for each layer of its stage, its own KV heads, in blocks.

    key_cache[layer]   [num_blocks, block_size, local_kv_heads, head_dim]
    value_cache[layer] the same with the size of a value head, or a part of each key (`AttentionSpec.caches`)

A block id means the same place in every layer and on every rank of a replica.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from pathlib import Path

import psutil
import torch

from ..shardformer.backends import AttentionSpec
from ..shardformer.base import Stage
from .pages import HUGE_PAGE, PagesAhead, zeros

_TOKENS_AHEAD, _BYTES_AHEAD = 49152, 2 << 30  # touched at the start: so much memory is taken in any case


class KVCache:
    """Allocates the caches of a stage and gives each attention module its own."""

    def __init__(self, stage: Stage, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._ahead: PagesAhead | None = None
        new = partial(_zeros, dtype=stage.dtype, device=stage.device)
        self._regions = list[tuple[int, int]]()  # addresses and bytes, on a CPU: no cache is kept alive by this
        for attention in stage.attentions:
            caches = attention.backend.spec.caches(num_blocks, block_size, new)
            attention.bind_cache(*caches)
            whole = caches[:1] if attention.backend.spec.values_in_keys else caches
            if stage.device.type == "cpu":
                self._regions += [(cache.data_ptr(), cache.nbytes) for cache in whole if cache.nbytes >= HUGE_PAGE]

    def touch_ahead(self, idle_s: Callable[[], float]) -> None:
        """On a CPU, has the system give the blocks that are used first. idle_s: as for `PagesAhead`."""
        if self._regions:
            num_bytes = sum(size for _, size in self._regions)
            part = min(1.0, _TOKENS_AHEAD / (self.num_blocks * self.block_size), _BYTES_AHEAD / num_bytes)
            self._ahead = PagesAhead([(address, int(part * size)) for address, size in self._regions], idle_s)

    def let_go(self) -> None:
        if self._ahead is not None:
            self._ahead.end()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, not empty: a padded block table reads block 0, whose masked values must be finite.

    On the CPU pages that are zeros when they are first touched, which torch.zeros would fill at once.
    """
    if device.type != "cpu" or not prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(zeros(prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def copy_blocks(stage: Stage, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copies blocks in every layer: int64 [n] each; what is copied is what was there before."""
    for attention in stage.attentions:
        caches = [attention.key_cache]
        if not attention.backend.spec.values_in_keys:
            caches.append(attention.value_cache)
        for cache in caches:
            cache.index_copy_(0, targets, cache.index_select(0, sources))


def block_bytes(stage: Stage, block_size: int) -> int:
    """Bytes that one block takes on this rank, all its layers together."""
    return cache_bytes((attention.backend.spec for attention in stage.attentions), block_size)


def cache_bytes(layers: Iterable[AttentionSpec], num_tokens: int) -> int:
    """Bytes that so many tokens take in the caches of these layers."""
    return num_tokens * sum(spec.token_size * spec.dtype.itemsize for spec in layers)


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device now; on the CPU also within this process's control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    available = int(psutil.virtual_memory().available)
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no control groups here, or the limit reads "max"
        return None


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far; 0 where the system does not tell."""
    return _own_status("VmHWM")


def rss_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not tell."""
    return _own_status("VmRSS")


def _own_status(field: str) -> int:
    try:
        for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
