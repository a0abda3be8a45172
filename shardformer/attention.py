"""Multi-head attention of a decoder layer over a paged KV cache."""

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..policies import LayerModules, ModelSpec
from .backends import AttentionMetadata, AttentionSpec, create_backend
from .linear import ColumnParallelLinear, RowParallelLinear, Slices
from .shard import Shards

_TABLE_ROWS = 4096  # built at a time: what is held in float32 beside the table


class RotaryTable(nn.Module):
    """cos and sin of every position up to `length`: [length, head_dim / 2] each; one table for all layers."""

    def __init__(self, spec: ModelSpec, length: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        inv_freq = torch.tensor(spec.rotary.inv_freq, dtype=torch.float32, device=device)
        self.cos: Tensor
        self.sin: Tensor
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(length, len(inv_freq), dtype=dtype, device=device), persistent=False)
        for start in range(0, length, _TABLE_ROWS):
            stop = min(start + _TABLE_ROWS, length)
            angles = torch.arange(start, stop, device=device).float()[:, None] * inv_freq
            self.cos[start:stop] = angles.cos() * spec.rotary.scaling
            self.sin[start:stop] = angles.sin() * spec.rotary.scaling


def attention_spec(
    spec: ModelSpec, shards: Shards, tp_rank: int, dtype: torch.dtype, device: torch.device, block_size: int | None
) -> AttentionSpec:
    """What a decoder layer on a rank asks of its backend. block_size: of the cache; None: not yet known."""
    (start, stop), (kv_start, kv_stop) = shards.heads[tp_rank], shards.kv_heads[tp_rank]
    return AttentionSpec(
        num_heads=stop - start,
        num_kv_heads=kv_stop - kv_start,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5,
        dtype=dtype,
        device=device,
        block_size=block_size,
    )


class PagedAttention(nn.Module):
    """Projects, rotates, stores K and V into the cache and attends; this rank's heads only, summed over tp.

    The backend is an object made here, from the layer's own numbers, and kept.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: LayerModules,
        prefix: str,
        slices: Slices,
        ops: Ops,
        backend: str,
        device: torch.device,
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        asked = attention_spec(spec, slices.shards, slices.tp.rank, slices.dtype, device, block_size)
        self.num_heads, self.num_kv_heads, self.head_dim = asked.num_heads, asked.num_kv_heads, asked.head_dim
        self.qkv = ColumnParallelLinear([layer.query, layer.key, layer.value], prefix, slices, ops)
        self.out = RowParallelLinear(layer.output, prefix, slices, ops)
        self.rotary_store_kv = ops.rotary_store_kv
        self.backend = create_backend(backend, asked)
        self.key_cache = self.value_cache = torch.empty(0)

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Takes this layer's cache: two of [num_blocks, block_size, local_kv_heads, head_dim]."""
        self.key_cache, self.value_cache = key_cache, value_cache

    def forward(self, x: Tensor, rotary: RotaryTable, metadata: AttentionMetadata) -> Tensor:
        qkv = self.qkv(x).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        key_cache, value_cache = self.key_cache, self.value_cache
        query = self.rotary_store_kv(
            query, key, value, rotary.cos, rotary.sin, metadata.positions, key_cache, value_cache, metadata.slots
        )
        out = self.backend.forward(query, key_cache, value_cache, metadata.plans[self.backend.plan_key])
        return self.out(out.view(-1, self.num_heads * self.head_dim))
