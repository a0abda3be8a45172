"""One pipeline stage's forward: [embedding] + some decoder layers + [final norm + LM head]."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..policies import DecoderSpec, LatentSpec, LayerSpec, MLPSpec, Module, MoESpec, MultiHeadSpec, Residual
from .attention import PagedAttention, RotaryTable
from .backends import AttentionMetadata
from .base import Stage, pick
from .embedding import Embedding, Head
from .latent_attention import LatentAttention
from .linear import (
    ActivatedLinear,
    Context,
    PartialLinear,
    PostNorm,
    RowParallelLinear,
    Scale,
    Slices,
    add_norm,
)
from .moe import MixtureOfExperts
from .shard import Range


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` or ``down(activation(up(x)))``, the intermediate dim split over tp."""

    def __init__(self, spec: MLPSpec, prefix: str, context: Context, partial: bool = False) -> None:
        super().__init__()
        self.up = ActivatedLinear(spec.gate, spec.up, spec.activation, prefix, context)
        self.down = (PartialLinear if partial else RowParallelLinear)(spec.down, prefix, context)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


ATTENTIONS: dict[type, Callable[..., nn.Module]] = {MultiHeadSpec: PagedAttention, LatentSpec: LatentAttention}
MLPS: dict[type, Callable[..., nn.Module]] = {MLPSpec: MLP, MoESpec: MixtureOfExperts}
"""What is built for what a policy declares: each takes (declaration, prefix, context, partial)."""

Attend = Callable[..., Tensor]
"""A layer's attention in a step, which takes x and `wanted`."""


class DecoderLayer(nn.Module):
    """Attention and MLP around a residual stream, in the order of the family.

    Takes and gives (x, residual): the stream is their sum, which the next norm makes in passing. Of the model's last
    layer not all tokens are `wanted`: after a prompt that is one, and the layer ends with it alone.
    """

    def __init__(self, spec: LayerSpec, prefix: str, context: Context) -> None:
        super().__init__()
        is_parallel = spec.residual is Residual.PARALLEL
        self.attention = ATTENTIONS[type(spec.attention)](spec.attention, prefix, context, is_parallel)
        self.mlp = MLPS[type(spec.mlp)](spec.mlp, prefix, context, is_parallel)
        self.input_norm = add_norm(spec.input_norm, prefix, context)
        self.mlp_norm: nn.Module | None = add_norm(spec.mlp_norm, prefix, context)
        if is_parallel:
            self.tp = context.slices.tp
            self.mlp_norm = None if spec.mlp_norm is None else PostNorm(spec.mlp_norm, prefix, context)
        multiplier = spec.residual_multiplier
        self.attention_end = _end(spec.attention_post_norm, multiplier, prefix, context)
        self.mlp_end = _end(spec.mlp_post_norm, multiplier, prefix, context)
        self._run = {
            Residual.SEQUENTIAL: self._sequential,
            Residual.PARALLEL: self._parallel,
            Residual.POST_NORM: self._post_norm,
        }[spec.residual]

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotaries: Sequence[RotaryTable],
        metadata: AttentionMetadata,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return self._run(x, residual, partial(self.attention, rotaries=rotaries, metadata=metadata), wanted)

    def _sequential(
        self, x: Tensor, residual: Tensor | None, attend: Attend, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = self.input_norm(x, residual)
        x = self.attention_end(attend(x, wanted=wanted))
        assert self.mlp_norm is not None
        x, residual = self.mlp_norm(x, pick(residual, wanted))
        return self.mlp_end(self.mlp(x)), residual

    def _parallel(
        self, x: Tensor, residual: Tensor | None, attend: Attend, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = self.input_norm(x, residual)
        residual = pick(residual, wanted)
        other = pick(x, wanted) if self.mlp_norm is None else self.mlp_norm(residual)
        return self.tp.all_reduce(attend(x, wanted=wanted) + self.mlp(other)), residual

    def _post_norm(
        self, x: Tensor, residual: Tensor | None, attend: Attend, wanted: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert residual is None and self.mlp_norm is not None
        x, _ = self.input_norm(attend(x, wanted=wanted), pick(x, wanted))
        x, _ = self.mlp_norm(self.mlp(x), x)
        return x, None


def _end(norm: Module | None, multiplier: float, prefix: str, context: Context) -> nn.Module:
    """What becomes of a part's result before it is added."""
    if norm is not None:
        return PostNorm(norm, prefix, context)
    return nn.Identity() if multiplier == 1.0 else Scale(multiplier)


class PipelineStage(Stage):
    """A stage of our own layers; the rotary tables are made on the real device."""

    def __init__(
        self,
        spec: DecoderSpec,
        layers: Range,
        slices: Slices,
        ops: Ops,
        *,
        backend: str,
        max_model_len: int,
        device: torch.device,
        block_size: int | None = None,
    ) -> None:
        super().__init__(spec, layers, slices.dtype, device)
        context = Context(slices, ops, spec.norm, backend, device, block_size)
        with torch.device("meta"):
            self.embedding = Embedding(spec.embedding, context) if self.is_first else None
            self.layers = nn.ModuleList(
                DecoderLayer(spec.layers[index], spec.layer_prefix(index), context) for index in range(*layers)
            )
            if self.is_last:
                is_shared = spec.tied_embeddings and self.embedding is not None
                tied = cast(Embedding, self.embedding).tokens if is_shared else None
                self.head = Head(spec.head, context, tied)
        self.rotaries = nn.ModuleList(
            RotaryTable(rotary, max_model_len, slices.dtype, device) for rotary in spec.rotaries
        )

    @property
    def attentions(self) -> Iterator[PagedAttention | LatentAttention]:
        for layer in self.layers:
            yield cast(DecoderLayer, layer).attention  # type: ignore[misc]

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """What it gives is the residual stream with everything added."""
        return self.end(*self.begin(self.embed(x, metadata), metadata), metadata)

    def embed(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        return x if self.embedding is None else self.embedding(x, metadata.positions)

    def begin(self, x: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, Tensor | None]:
        """All layers but the model's last one, which may not give all tokens; x and residual."""
        residual: Tensor | None = None
        rotaries: Any = (*self.rotaries,)  # a ModuleList looks an item up by its name, each time
        layers = [*self.layers]
        for layer in layers[:-1] if self.is_last else layers:
            x, residual = layer(x, residual, rotaries, metadata)
        return x, residual

    def end(self, x: Tensor, residual: Tensor | None, metadata: AttentionMetadata) -> Tensor:
        if self.is_last:
            x, residual = self.layers[-1](x, residual, (*self.rotaries,), metadata, metadata.wanted)
        return x if residual is None else x + residual

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits

    def last_hidden(self, hidden: Tensor) -> Tensor:
        normalised: Tensor = self.head.norm(hidden)
        return normalised
