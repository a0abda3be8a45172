"""What the engine sees of a pipeline stage, whoever's layers it is made of."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..policies import ModelSpec
from .backends import AttentionBackend, AttentionMetadata
from .shard import Range


class Stage(nn.Module, ABC):
    """This rank's part of the model: [embedding] + some decoder layers + [final norm + LM head].

    Built on the meta device; `load_weights` fills it.
    """

    weight_bytes = 0  # of all parameters, once they are loaded
    supports_graphs = True
    """Whether `forward` can be recorded and replayed, as far as it is not the attention backends'."""

    def __init__(self, spec: ModelSpec, layers: Range, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec, self.layer_range, self.dtype, self.device = spec, layers, dtype, device
        self.is_first, self.is_last = layers[0] == 0, layers[1] == spec.num_layers

    @property
    @abstractmethod
    def attentions(self) -> Iterator[Any]:
        """The modules of this stage's layers that have a backend and take a cache, in order."""

    @property
    def backends(self) -> dict[str, AttentionBackend]:
        """One of each kind of backend bound on this stage, by `plan_key`: they prepare the step for all layers."""
        return {attention.backend.plan_key: attention.backend for attention in self.attentions}

    def prove(self) -> None:
        """Proves what can only be seen once the weights are there. Raises ValueError."""

    @abstractmethod
    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """x: token ids [num_tokens] on the first stage, else hidden states [num_tokens, hidden] of the one before.

        Returns hidden states [num_tokens, hidden], for the next stage or for `logits`: on the last stage of those
        tokens that `metadata.wanted` names, where it does.
        """

    def embed(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """How `forward` begins."""
        return x

    def begin(self, x: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, Tensor | None]:
        """How it goes on: the part that may be recorded for any number of tokens, with which all do the same."""
        return x, None

    def end(self, x: Tensor, residual: Tensor | None, metadata: AttentionMetadata) -> Tensor:
        """The rest of it, of what `begin` gave."""
        out: Tensor = self(x, metadata)
        return out

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Last stage: [num_rows, hidden] -> logits of this rank's vocabulary [num_rows, local_vocab], in float32 or
        the model's dtype."""

    @abstractmethod
    def last_hidden(self, hidden: Tensor) -> Tensor:
        """Last stage: [num_rows, hidden] -> what transformers calls `last_hidden_state`, of which logits are made."""

    def let_go(self) -> None:
        """Takes all modules apart, for the last time: some refer to themselves, and such a circle would keep weights,
        cache and process groups until the garbage collector comes by."""
        for module in list(self.modules()):
            module.__dict__.clear()


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """Of x [num_tokens, ...] the tokens that are wanted; None: all."""
    return x if wanted is None else x.index_select(0, wanted)
