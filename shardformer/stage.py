"""One pipeline stage's forward: [embedding] + some decoder layers + [final norm + LM head]."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..policies import ModelSpec
from .attention import PagedAttention, RotaryTable
from .backends import AttentionBackend, AttentionMetadata
from .embedding import VocabParallelEmbedding, VocabParallelHead
from .linear import ColumnParallelLinear, RMSNorm, RowParallelLinear, Slices
from .shard import Range


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, the intermediate dim split over tp."""

    def __init__(self, spec: ModelSpec, prefix: str, slices: Slices, ops: Ops) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear([spec.layer.gate, spec.layer.up], prefix, slices, ops)
        self.down = RowParallelLinear(spec.layer.down, prefix, slices, ops)
        self.activation = ops.gated_activation("silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm that also adds the previous one's result to the residual stream."""

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        slices: Slices,
        ops: Ops,
        backend: str,
        device: torch.device,
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        prefix = spec.layer_prefix(index)
        self.input_norm = RMSNorm(spec.layer.input_norm, prefix, slices, spec.norm_eps, ops)
        self.attention = PagedAttention(spec, spec.layer, prefix, slices, ops, backend, device, block_size)
        self.mlp_norm = RMSNorm(spec.layer.mlp_norm, prefix, slices, spec.norm_eps, ops)
        self.mlp = GatedMLP(spec, prefix, slices, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, rotary: RotaryTable, metadata: AttentionMetadata
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_norm(x, residual)
        x = self.attention(x, rotary, metadata)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


class PipelineStage(nn.Module):
    """This rank's part of the model. Built on the meta device; the rotary table on the real one."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: Range,
        slices: Slices,
        ops: Ops,
        *,
        backend: str,
        max_model_len: int,
        device: torch.device,
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layer_range, self.dtype, self.device = spec, layers, slices.dtype, device
        self.is_first, self.is_last = layers[0] == 0, layers[1] == spec.num_layers
        with torch.device("meta"):
            self.embedding = VocabParallelEmbedding(spec.embedding, slices, ops) if self.is_first else None
            self.layers = nn.ModuleList(
                DecoderLayer(spec, index, slices, ops, backend, device, block_size) for index in range(*layers)
            )
            if self.is_last:
                self.final_norm = RMSNorm(spec.final_norm, "", slices, spec.norm_eps, ops)
                head = spec.embedding if spec.tied_embeddings else spec.lm_head
                self.lm_head = VocabParallelHead(head, slices, ops, self.embedding if spec.tied_embeddings else None)
        self.weight_bytes = 0  # of all parameters, once they are loaded
        self.rotary = RotaryTable(spec, max_model_len, slices.dtype, device)

    @property
    def attentions(self) -> Iterator[PagedAttention]:
        """The attention modules of this stage's layers, in order."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer.attention

    @property
    def backends(self) -> dict[str, AttentionBackend]:
        """One of each kind of backend bound on this stage, by `plan_key`: they prepare the step for all layers."""
        return {attention.backend.plan_key: attention.backend for attention in self.attentions}

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x: token ids [num_tokens] on the first stage, else hidden states [num_tokens, hidden] of the one before.

        Returns hidden states [num_tokens, hidden]: the residual stream with everything added.
        """
        if self.embedding is not None:
            x = self.embedding(x)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, self.rotary, metadata)
        return x if residual is None else x + residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage: [num_rows, hidden] -> float32 logits of this rank's vocabulary [num_rows, local_vocab]."""
        normalised, _ = self.final_norm(hidden, None)
        return self.lm_head(normalised)
