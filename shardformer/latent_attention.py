"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over a paged cache of latents."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..policies import LatentSpec, Module
from .attention import RotaryTable, attention_spec
from .backends import AttentionMetadata, create_backend
from .base import pick
from .linear import ColumnParallelLinear, Context, PartialLinear, RowParallelLinear
from .weights import LoadedModule


class SmallNorm(LoadedModule):
    """RMS norm of what is narrower than the hidden state, [num_tokens, size]; replicated over tp."""

    def __init__(self, module: Module, prefix: str, eps: float, context: Context) -> None:
        super().__init__()
        self.weight, pieces = context.slices.weight([module], prefix)
        self.pieces = {"weight": pieces}
        self.eps = eps
        self.rms_norm = context.ops.rms_norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rms_norm(x, self.weight, self.eps)
        return out


class Expansion(LoadedModule):
    """What makes keys and values of a latent, taken to the other side: queries go to the latents, and of latents that
    attention has summed come values. No key or value is ever made.

        query · (K latent) = (Kᵀ query) · latent        sum of weights * (V latent) = V (sum of weights * latent)
    """

    def __init__(self, spec: LatentSpec, num_heads: int, prefix: str, context: Context) -> None:
        super().__init__()
        self.weight, pieces = context.slices.weight([spec.expansion], prefix)
        self.pieces = {"weight": pieces}
        self.num_heads, self.nope_dim = num_heads, spec.nope_dim
        self.keys: Tensor  # [heads, nope_dim, latent]
        self.values: Tensor  # [heads, latent, value_dim]

    def bind(self) -> None:
        weight = self.weight.data.view(self.num_heads, -1, self.weight.shape[1])
        self.keys, self.values = weight[:, : self.nope_dim], weight[:, self.nope_dim :].mT

    def queries(self, query: Tensor) -> Tensor:
        """[num_tokens, heads, nope_dim] -> [num_tokens, heads, latent]"""
        return torch.bmm(query.transpose(0, 1), self.keys).transpose(0, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """[num_tokens, heads, latent] -> [num_tokens, heads, value_dim]"""
        return torch.bmm(latents.transpose(0, 1), self.values).transpose(0, 1)


class LatentAttention(nn.Module):
    """Caches each token's latent and the rotary part of its key, once for all heads, on every rank; attends with this
    rank's query heads, summed over tp.

    One head of the cache is ``| rotary part | latent |``, the latent being the value. partial: the sum over tp is left
    to the caller.
    """

    def __init__(self, spec: LatentSpec, prefix: str, context: Context, partial: bool = False) -> None:
        super().__init__()
        slices = context.slices
        asked = attention_spec(
            spec.kind, slices.shards, slices.tp.rank, slices.dtype, context.device, context.block_size
        )
        self.num_heads, self.num_kv_heads, self.head_dim = asked.num_heads, asked.num_kv_heads, asked.head_dim
        first = spec.query if spec.query_down is None else spec.query_down
        assert first.bias == spec.latent.bias, "they are one product"
        self.input = ColumnParallelLinear([first, spec.latent], prefix, context)
        self.parts = (slices.length(first.dims[0], first.sizes[0]), asked.value_size, spec.rotary_dim)
        self.query_parts = (spec.nope_dim, spec.rotary_dim)
        self.query: nn.Module = nn.Identity()
        if spec.query_norm is not None:
            self.query = nn.Sequential(
                SmallNorm(spec.query_norm, prefix, spec.norm_eps, context),
                ColumnParallelLinear([spec.query], prefix, context),
            )
        self.latent_norm = SmallNorm(spec.latent_norm, prefix, spec.norm_eps, context)
        self.expansion = Expansion(spec, self.num_heads, prefix, context)
        self.out = (PartialLinear if partial else RowParallelLinear)(spec.output, prefix, context)
        self.rotary, self.interleaved = spec.rotary, spec.interleaved
        self.rotary_store_kv = context.ops.rotary_store_kv
        self.backend = create_backend(context.backend, asked)
        self.key_cache = self.value_cache = torch.empty(0)

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Takes this layer's cache: [num_blocks, block_size, 1, rotary_dim + latent], and the latents in it."""
        self.key_cache, self.value_cache = key_cache, value_cache

    def forward(
        self, x: Tensor, rotaries: Sequence[RotaryTable], metadata: AttentionMetadata, wanted: Tensor | None = None
    ) -> Tensor:
        """x: [num_tokens, hidden]; rotaries: the model's, of which the layer has one; wanted: tokens for which the
        result is needed, None: all. Returns [num_wanted, hidden]."""
        query, latent, rotary_key = self.input(x).split(self.parts, dim=-1)
        query = self.query(query).unflatten(-1, (self.num_heads, -1))
        query, rotary_query = query.split(self.query_parts, dim=-1)
        query = torch.cat((rotary_query, self.expansion.queries(query)), dim=-1)
        key = torch.cat((rotary_key, self.latent_norm(latent)), dim=-1).unsqueeze(1)
        table = rotaries[self.rotary]
        key_cache, value_cache, slots = self.key_cache, self.value_cache, metadata.slots
        query = self.rotary_store_kv(
            query, key, None, table.cos, table.sin, metadata.positions, key_cache, value_cache, slots, self.interleaved
        )
        latents = self.backend.forward(query, key_cache, value_cache, metadata.plans[self.backend.plan_key])
        return self.out(self.expansion(pick(latents, wanted)).flatten(1))
