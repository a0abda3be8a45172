"""From token ids to hidden states, and from hidden states to logits: both split over the vocabulary."""

import torch
from torch import Tensor, nn

from ..kernels.linear import LookUp
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
        self.weight: nn.Parameter | None
        self.weight, pieces = slices.weight([module], "")
        self.pieces = {"weight": pieces}
        self._look_up: LookUp | None = None  # where the weight is another's, in another form

    def look_up_by(self, look_up: LookUp) -> None:
        """Lets the weight go: who is tied to it holds it now."""
        self._look_up = look_up
        if self.weight is not None and not self.weight.is_meta:  # else it is still to be "loaded", and then bound
            self.bind()

    def bind(self) -> None:
        if self._look_up is not None:
            self.weight = None

    def forward(self, token_ids: Tensor) -> Tensor:
        if self._look_up is not None:
            return self.tp.all_reduce(self._look_up(token_ids, self.start))
        assert self.weight is not None
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
    """[num_rows, hidden] -> logits of this rank's vocabulary shard [num_rows, local_vocab].

    widens: they come in float32, for more is done to them; else in the model's dtype, which they are rounded to. tied:
    the embedding whose weight it shares, when both are on this stage. The weight is held once, in the form of the
    product where look-ups can read that, else plain.
    """

    def __init__(
        self, module: Module, context: Context, tied: VocabParallelEmbedding | None, widens: bool = False
    ) -> None:
        super().__init__([module], "", context)
        self._widens = widens
        self._bind_tied, self._tied = context.ops.bind_tied_linear, [tied]  # a list: no module of this one
        if tied is not None:
            self.weight = tied.weight

    def bind(self) -> None:
        (tied,) = self._tied
        if tied is None:
            super().bind()
            return
        assert self.weight is not None
        is_ours = isinstance(tied, VocabParallelEmbedding)  # else it reads the plain weight itself
        self.product, look_up = self._bind_tied(self.weight.data, not is_ours)
        self.weight = None
        if look_up is not None:
            tied.look_up_by(look_up)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.product(x, self.bias)
        return logits.float() if self._widens else logits


class Head(nn.Module):
    """The residual stream [num_rows, hidden] -> logits of this rank's vocabulary [num_rows, local_vocab]: in the
    model's dtype, or, where more is done to them, in float32."""

    def __init__(self, spec: HeadSpec, context: Context, tied: VocabParallelEmbedding | None) -> None:
        super().__init__()
        steps: list[nn.Module] = [] if spec.norm is None else [PostNorm(spec.norm, "", context)]
        if spec.projection is not None:
            steps.append(ColumnParallelLinear([spec.projection], "", context))
        self.norm = nn.Sequential(*steps)
        self.multiplier, self.softcap = spec.multiplier, spec.softcap
        widens = self.multiplier != 1.0 or self.softcap is not None
        self.linear = VocabParallelHead(spec.linear, context, tied, widens)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(hidden))
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh() * self.softcap
        return logits
