"""Linear layers and norms that hold one tp rank's slices of the checkpoint's modules.

The parallel style follows from the dims that the policy names: a weight split along its output is column-parallel,
along its input row-parallel (Shoeybi et al. 2019, Megatron-LM).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..kernels.linear import Linear
from ..mesh.collectives import Communicator
from ..policies import Dim, Module
from .shard import Shards
from .weights import LoadedModule, Piece


class Slices:
    """This rank's place in the tp split: makes the pieces from which parameters are loaded."""

    def __init__(self, shards: Shards, tp: Communicator, dtype: torch.dtype) -> None:
        self.shards, self.tp, self.dtype = shards, tp, dtype

    def length(self, dim: Dim) -> int:
        return self.shards.length(dim, self.tp.rank)

    def pieces(self, modules: Sequence[Module], prefix: str, suffix: str = "weight") -> list[Piece]:
        """The slices of several modules' weights (or biases), one below the other."""
        pieces, row = [], 0
        for module in modules:
            dims = module.dims if suffix == "weight" else module.dims[:1]
            ranges = tuple(self.shards.range(dim, self.tp.rank) for dim in dims)
            piece = Piece(f"{prefix}{module.name}.{suffix}", ranges, (row,))
            pieces.append(piece)
            row += piece.shape[0]
        return pieces

    def parameter(self, pieces: Sequence[Piece]) -> nn.Parameter:
        """An unfilled parameter of the shape that the pieces make together."""
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
        return nn.Parameter(torch.empty(shape, dtype=self.dtype), requires_grad=False)


class ParallelLinear(LoadedModule):
    """This rank's slices of some modules' weights, one below the other, and their product with an input.

    The product is bound once the weight is loaded (`bind`), in the form that is fastest; the plain weight is let go.
    """

    def __init__(self, modules: Sequence[Module], prefix: str, slices: Slices, ops: Ops) -> None:
        super().__init__()
        self.pieces = {"weight": slices.pieces(modules, prefix)}
        self.weight: nn.Parameter | None = slices.parameter(self.pieces["weight"])
        self.bias: nn.Parameter | None = None
        if modules[0].bias:
            self.pieces["bias"] = slices.pieces(modules, prefix, "bias")
            self.bias = slices.parameter(self.pieces["bias"])
        self._bind_linear = ops.bind_linear
        self.product: Linear

    def bind(self) -> None:
        assert self.weight is not None
        self.product = self._bind_linear(self.weight.data)
        self.weight = None


class ColumnParallelLinear(ParallelLinear):
    """Several linear layers of the same input as one product: [num_tokens, in] -> [num_tokens, sum of local outs]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class RowParallelLinear(ParallelLinear):
    """A linear layer over this rank's part of the input, summed over tp: [num_tokens, local in] -> [num_tokens, out].

    The bias is added once, after the sum.
    """

    def __init__(self, module: Module, prefix: str, slices: Slices, ops: Ops) -> None:
        super().__init__([module], prefix, slices, ops)
        self.tp = slices.tp

    def forward(self, x: Tensor) -> Tensor:
        out = self.tp.all_reduce(self.product(x, None))
        return out if self.bias is None else out + self.bias


class RMSNorm(LoadedModule):
    """Adds to the residual stream and normalises: (x, residual) -> (normalised sum, sum); replicated over tp."""

    def __init__(self, module: Module, prefix: str, slices: Slices, eps: float, ops: Ops) -> None:
        super().__init__()
        self.eps = eps
        self.add_rms_norm = ops.add_rms_norm
        self.pieces = {"weight": slices.pieces([module], prefix)}
        self.weight = slices.parameter(self.pieces["weight"])

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.add_rms_norm(x, residual, self.weight, self.eps)
