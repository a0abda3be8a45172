"""From token ids to hidden states, and from hidden states to logits: both split over the vocabulary."""

import torch
from torch import Tensor, nn

from ..policies import Dim, EmbeddingSpec, HeadSpec, Module
from .linear import ColumnParallelLinear, Context, ParallelLinear, PostNorm
from .weights import LoadedModule


class VocabParallelEmbedding(LoadedModule):
    """[num_tokens] ids -> [num_tokens, hidden]: each rank looks up its own ids, the sum over tp is the whole."""

    def __init__(self, module: Module, context: Context) -> None:
        super().__init__()
        slices = context.slices
        self.tp = slices.tp
        self.start = slices.range(Dim.VOCABULARY, module.sizes[0])[0]
        self.embedding = context.ops.embedding
        self.weight, pieces = slices.weight([module], "")
        self.pieces = {"weight": pieces}

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.tp.all_reduce(self.embedding(token_ids, self.weight, self.start))


class PositionEmbedding(LoadedModule):
    """Learned positions, whole on every rank: [num_tokens] positions -> [num_tokens, hidden]."""

    def __init__(self, module: Module, first: int, context: Context) -> None:
        super().__init__()
        self.first = first
        self.weight, pieces = context.slices.weight([module], "")
        self.pieces = {"weight": pieces}

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions + self.first]


class Embedding(nn.Module):
    """Token ids and positions [num_tokens] -> hidden states [num_tokens, hidden]."""

    def __init__(self, spec: EmbeddingSpec, context: Context) -> None:
        super().__init__()
        self.tokens = VocabParallelEmbedding(spec.tokens, context)
        # In the dtype of the weights, as transformers does it: sqrt(hidden) is not a bfloat16.
        self.multiplier = torch.tensor(spec.multiplier, dtype=context.slices.dtype, device="cpu").item()
        self.projection: nn.Module | None = None
        if spec.projection is not None:
            self.projection = ColumnParallelLinear([spec.projection], "", context)
        self.positions: nn.Module | None = None
        if spec.positions is not None:
            self.positions = PositionEmbedding(spec.positions, spec.first_position, context)
        self.norm: nn.Module | None = None
        if spec.norm is not None:
            self.norm = PostNorm(spec.norm, "", context)

    def forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.tokens(token_ids)
        if self.projection is not None:
            x = self.projection(x)
        if self.multiplier != 1.0:
            x = x * self.multiplier
        if self.positions is not None:
            x = x + self.positions(positions)
        return x if self.norm is None else self.norm(x)


class VocabParallelHead(ParallelLinear):
    """[num_rows, hidden] -> float32 logits of this rank's vocabulary shard [num_rows, local_vocab].

    tied: the embedding whose weight it shares, when both are on this stage. The weight then stays plain, since
    look-ups need it so, and is held once.
    """

    def __init__(self, module: Module, context: Context, tied: VocabParallelEmbedding | None) -> None:
        super().__init__([module], "", context)
        if tied is not None:
            self.weight = tied.weight
            self._bind_linear = context.ops.bind_shared_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias).float()


class Head(nn.Module):
    """The residual stream [num_rows, hidden] -> float32 logits of this rank's vocabulary [num_rows, local_vocab]."""

    def __init__(self, spec: HeadSpec, context: Context, tied: VocabParallelEmbedding | None) -> None:
        super().__init__()
        steps: list[nn.Module] = [] if spec.norm is None else [PostNorm(spec.norm, "", context)]
        if spec.projection is not None:
            steps.append(ColumnParallelLinear([spec.projection], "", context))
        self.norm = nn.Sequential(*steps)
        self.linear = VocabParallelHead(spec.linear, context, tied)
        self.multiplier, self.softcap = spec.multiplier, spec.softcap

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(hidden))
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits
