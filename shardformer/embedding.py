"""The embedding and the LM head, split over the vocabulary."""

from torch import Tensor

from ..kernels import Ops
from ..policies import Dim, Module
from .linear import ParallelLinear, Slices
from .weights import LoadedModule


class VocabParallelEmbedding(LoadedModule):
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


class VocabParallelHead(ParallelLinear):
    """[num_rows, hidden] -> float32 logits of this rank's vocabulary shard [num_rows, local_vocab].

    tied: the embedding whose weight it shares, when both are on this stage. The weight then stays plain, since
    look-ups need it so, and is held once.
    """

    def __init__(self, module: Module, slices: Slices, ops: Ops, tied: VocabParallelEmbedding | None) -> None:
        super().__init__([module], "", slices, ops)
        if tied is not None:
            self.weight = tied.weight
            self._bind_linear = ops.bind_shared_linear

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, None).float()
