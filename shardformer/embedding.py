"""The embedding and the LM head, split over the vocabulary."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Ops
from ..policies import Dim, Module
from .linear import Slices


class VocabParallelEmbedding(nn.Module):
    """[num_tokens] ids -> [num_tokens, hidden]: each rank looks up its own ids, the sum over tp is the whole."""

    def __init__(self, module: Module, slices: Slices, ops: Ops) -> None:
        super().__init__()
        self.tp = slices.tp
        self.start = slices.shards.range(Dim.VOCABULARY, slices.tp.rank)[0]
        self.embedding = ops.embedding
        self.pieces = {"weight": slices.pieces([module], "")}
        self.weight = slices.parameter(self.pieces["weight"])

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.tp.all_reduce(self.embedding(token_ids, self.weight, self.start))


class VocabParallelHead(nn.Module):
    """[num_rows, hidden] -> float32 logits of this rank's vocabulary shard [num_rows, local_vocab].

    `tied` is the embedding whose weight it shares, when both are on this stage.
    """

    def __init__(self, module: Module, slices: Slices, tied: VocabParallelEmbedding | None) -> None:
        super().__init__()
        self.pieces = {"weight": slices.pieces([module], "")}
        self.weight: nn.Parameter = tied.weight if tied is not None else slices.parameter(self.pieces["weight"])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).float()
