"""Multi-head attention of a decoder layer over a paged KV cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..policies import AttentionKind, Module, MultiHeadSpec, QKNorm, RotarySpec
from .backends import AttentionMetadata, AttentionSpec, create_backend
from .base import pick
from .linear import ColumnParallelLinear, Context, PartialLinear, RowParallelLinear
from .shard import Shards
from .weights import LoadedModule

_TABLE_ROWS = 4096  # built at a time: what is held in float32 beside the table


class RotaryTable(nn.Module):
    """cos and sin of every position up to `length`: [length, pairs] each; one table for all layers of its kind."""

    def __init__(self, spec: RotarySpec, length: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
        self.cos: Tensor
        self.sin: Tensor
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(length, len(inv_freq), dtype=dtype, device=device), persistent=False)
        for start in range(0, length, _TABLE_ROWS):
            stop = min(start + _TABLE_ROWS, length)
            angles = torch.arange(start, stop, device=device).float()[:, None] * inv_freq
            self.cos[start:stop] = angles.cos() * spec.scaling
            self.sin[start:stop] = angles.sin() * spec.scaling


def attention_spec(
    kind: AttentionKind,
    shards: Shards,
    tp_rank: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int | None,
) -> AttentionSpec:
    """What a decoder layer on a rank asks of its backend. block_size: of the cache; None: not yet known."""
    (start, stop), (kv_start, kv_stop) = shards.heads[tp_rank], shards.kv_heads[tp_rank]
    if kind.is_replicated:
        (start, stop), (kv_start, kv_stop) = (0, shards.num_heads), (0, shards.num_kv_heads)
    if kind.is_latent:
        kv_start, kv_stop = 0, 1
    return AttentionSpec(
        num_heads=stop - start,
        num_kv_heads=kv_stop - kv_start,
        head_dim=kind.head_dim,
        scale=kind.scale,
        dtype=dtype,
        device=device,
        window=kind.window,
        softcap=kind.softcap,
        has_sinks=kind.has_sinks,
        alibi_slopes=None if kind.alibi_slopes is None else kind.alibi_slopes[start:stop],
        block_size=block_size,
        value_dim=kind.value_dim,
        values_in_keys=kind.is_latent,
    )


class HeadNorms(LoadedModule):
    """Normalises each head of query and key, [num_tokens, heads, head_dim]: RMS, or about the mean where every head has
    a weight of its own, [heads, head_dim]."""

    def __init__(self, query: Module, key: Module, prefix: str, context: Context) -> None:
        super().__init__()
        self.query, query_pieces = context.slices.weight([query], prefix)
        self.key, key_pieces = context.slices.weight([key], prefix)
        self.pieces = {"query": query_pieces, "key": key_pieces}
        self.eps, self.offset = context.norm.eps, context.norm.offset
        self._normalise = self._rms if len(query.dims) == 1 else self._layer
        self._rms_norm, self._layer_norm = context.ops.rms_norm, context.ops.head_layer_norm

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._rms_norm(x, weight, self.eps, self.offset)
        return out

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._layer_norm(x, weight, self.eps)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self._normalise(query, self.query), self._normalise(key, self.key)


class FullNorms(LoadedModule):
    """RMS norm of all heads of query together, and of all heads of key: the sums of squares go over tp, in one."""

    def __init__(self, query: Module, key: Module, prefix: str, context: Context) -> None:
        super().__init__()
        slices, shards = context.slices, context.slices.shards
        self.tp, self.eps = slices.tp, context.norm.eps
        self.query, query_pieces = slices.weight([query], prefix)
        self.key, key_pieces = slices.weight([key], prefix)
        self.pieces = {"query": query_pieces, "key": key_pieces}
        copies = shards.kv_heads.count(shards.kv_heads[slices.tp.rank])  # ranks that hold the same KV heads
        self._shares = (1 / query.sizes[0], 1 / (key.sizes[0] * copies))

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        wide = [x.flatten(1).float() for x in (query, key)]
        means = [x.square().sum(-1) * share for x, share in zip(wide, self._shares, strict=True)]
        scales = self.tp.all_reduce(torch.stack(means)).add_(self.eps).rsqrt_().unsqueeze(-1)  # [2, num_tokens, 1]
        query, key = (
            ((x * scale).to(like.dtype) * weight).view(like.shape)
            for x, scale, weight, like in zip(wide, scales, (self.query, self.key), (query, key), strict=True)
        )
        return query, key


class Sinks(LoadedModule):
    """A logit more for each head."""

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__()
        self.weight, pieces = context.slices.weight([module], prefix)
        self.pieces = {"weight": pieces}


class PagedAttention(nn.Module):
    """Projects, normalises, rotates, stores K and V into the cache and attends; this rank's heads only, summed over tp.

    The backend is an object made here, from the layer's own numbers, and kept. partial: the sum over tp is left to the
    caller.
    """

    def __init__(self, spec: MultiHeadSpec, prefix: str, context: Context, partial: bool = False) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        asked = attention_spec(
            spec.kind, slices.shards, slices.tp.rank, slices.dtype, context.device, context.block_size
        )
        self.num_heads, self.num_kv_heads, self.head_dim = asked.num_heads, asked.num_kv_heads, asked.head_dim
        self.qkv = ColumnParallelLinear([spec.query, spec.key, spec.value], prefix, context)
        self.out = (PartialLinear if partial else RowParallelLinear)(spec.output, prefix, context)
        self.norms: nn.Module | None = None
        if spec.qk_norm is not None:
            assert spec.query_norm is not None and spec.key_norm is not None
            kind = FullNorms if spec.qk_norm is QKNorm.FULL else HeadNorms
            self.norms = kind(spec.query_norm, spec.key_norm, prefix, context)
        self.sinks = None if spec.sinks is None else Sinks(spec.sinks, prefix, context)
        self.rotary, self.interleaved = spec.rotary, spec.interleaved
        self.rotary_store_kv, self.store_kv = ops.rotary_store_kv, ops.store_kv
        self.backend = create_backend(context.backend, asked)
        self.key_cache = self.value_cache = torch.empty(0)

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Takes this layer's cache: two of [num_blocks, block_size, local_kv_heads, head_dim]."""
        self.key_cache, self.value_cache = key_cache, value_cache

    def forward(
        self, x: Tensor, rotaries: Sequence[RotaryTable], metadata: AttentionMetadata, wanted: Tensor | None = None
    ) -> Tensor:
        """x: [num_tokens, hidden]; rotaries: the model's, of which the layer has one or none; wanted: tokens for which
        the result is needed, None: all. Returns [num_wanted, hidden]."""
        qkv = self.qkv(x).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        query, key, value = qkv.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.norms is not None:
            query, key = self.norms(query, key)
        query = self._store(query, key, value, rotaries, metadata)
        plan = metadata.plans[self.backend.plan_key]
        sinks = None if self.sinks is None else self.sinks.weight
        out = self.backend.forward(query, self.key_cache, self.value_cache, plan, sinks)
        return self.out(pick(out.view(-1, self.num_heads * self.head_dim), wanted))

    def _store(
        self, query: Tensor, key: Tensor, value: Tensor, rotaries: Sequence[RotaryTable], metadata: AttentionMetadata
    ) -> Tensor:
        """Puts keys and values into the cache, rotated where the layer rotates; gives the query, contiguous."""
        key_cache, value_cache, slots = self.key_cache, self.value_cache, metadata.slots
        if self.rotary is None:
            self.store_kv(key, value, key_cache, value_cache, slots)
            return query.contiguous()
        table = rotaries[self.rotary]
        return self.rotary_store_kv(
            query, key, value, table.cos, table.sin, metadata.positions, key_cache, value_cache, slots, self.interleaved
        )
