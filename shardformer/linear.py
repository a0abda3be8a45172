"""Linear layers and norms that hold one tp rank's slices of the checkpoint's modules.

The parallel style follows from the dims that the policy names: a weight split along its output is column-parallel,
along its input row-parallel (Shoeybi et al. 2019, Megatron-LM).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..kernels.eager import activation_kind
from ..kernels.linear import Linear, followed
from ..mesh.collectives import Communicator
from ..policies import Dim, Module, NormSpec
from .shard import Range, Shards
from .weights import LoadedModule, Piece


class Slices:
    """This rank's place in the tp split: makes the pieces from which parameters are loaded."""

    def __init__(self, shards: Shards, tp: Communicator, dtype: torch.dtype) -> None:
        self.shards, self.tp, self.dtype = shards, tp, dtype

    def range(self, dim: Dim, size: int) -> Range:
        """(start, stop) of what this rank holds along a dim of `size` elements."""
        return self.shards.range(dim, size, self.tp.rank)

    def length(self, dim: Dim, size: int) -> int:
        return self.shards.length(dim, size, self.tp.rank)

    def weight(self, modules: Sequence[Module], prefix: str) -> tuple[nn.Parameter, list[Piece]]:
        """An unfilled parameter with this rank's slices of several modules' weights, one below the other."""
        pieces, row, inner = [], 0, tuple[Range, ...]()
        for module in modules:
            rows, *others = (self.range(dim, size) for dim, size in zip(module.dims, module.sizes, strict=True))
            inner = tuple(others)
            for run in module.runs(*rows):
                ranges = (*inner, run) if module.transposed else (run, *inner)
                pieces.append(Piece(prefix + module.name + module.parameter, ranges, (row,), module.transposed))
                row += run[1] - run[0]
        return self.blank(row, *(stop - start for start, stop in inner)), pieces

    def bias(self, modules: Sequence[Module], prefix: str) -> tuple[nn.Parameter | None, list[Piece]]:
        """The same of their biases; None where they have none."""
        pieces, row = [], 0
        for module in modules:
            for run in module.runs(*self.range(module.dims[0], module.sizes[0])) if module.bias else ():
                pieces.append(Piece(f"{prefix}{module.name}.bias", (run,), (row,)))
                row += run[1] - run[0]
        return (self.blank(row), pieces) if pieces else (None, [])

    def blank(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype), requires_grad=False)


@dataclass(frozen=True)
class Context:
    """What the modules of a stage are built with."""

    slices: Slices
    ops: Ops
    norm: NormSpec
    backend: str  # of attention: a name or "auto"
    device: torch.device
    block_size: int | None  # of the cache; None: not yet known


class ParallelLinear(LoadedModule):
    """This rank's slices of some modules' weights, one below the other, and their product with an input.

    The product is bound once the weight is loaded (`bind`), in the form that is fastest; the plain weight is let go.
    """

    def __init__(self, modules: Sequence[Module], prefix: str, context: Context, has_bias: bool = True) -> None:
        super().__init__()
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None = None
        self.weight, weight = context.slices.weight(modules, prefix)
        self.pieces = {"weight": weight}
        if has_bias:
            self.bias, bias = context.slices.bias(modules, prefix)
            self.pieces |= {"bias": bias} if bias else {}
        self._bind_linear: Callable[[Tensor], Linear] = context.ops.bind_linear
        self.product: Linear

    def bind(self) -> None:
        assert self.weight is not None
        self.product = self._bind_linear(self.weight.data)
        self.weight = None


class ColumnParallelLinear(ParallelLinear):
    """Several linear layers of the same input as one product: [num_tokens, in] -> [num_tokens, sum of local outs]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class ActivatedLinear(ColumnParallelLinear):
    """``activation(up(x))`` or, gated, ``activation(gate(x)) * up(x)``: [num_tokens, in] -> [num_tokens, local out]."""

    def __init__(self, gate: Module | None, up: Module, activation: str, prefix: str, context: Context) -> None:
        super().__init__([up] if gate is None else [gate, up], prefix, context)
        kind, ops = activation_kind(activation), context.ops
        if gate is None:
            self._bind_linear = lambda weight: followed(ops.bind_linear(weight), ops.activation(kind))
        else:
            self._bind_linear = lambda weight: ops.bind_gated_linear(weight, kind)


class RowParallelLinear(ParallelLinear):
    """A linear layer over this rank's part of the input, summed over tp: [num_tokens, local in] -> [num_tokens, out].

    The bias is added once, after the sum.
    """

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__([module], prefix, context)
        self.tp = context.slices.tp

    def forward(self, x: Tensor) -> Tensor:
        out = self.tp.all_reduce(self.product(x, None))
        return out if self.bias is None else out + self.bias


class PartialLinear(ParallelLinear):
    """A row-parallel layer whose sum over tp is left to its user; the bias is the first rank's."""

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__([module], prefix, context, has_bias=context.slices.tp.rank == 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class Norm(LoadedModule):
    """Adds to the residual stream and normalises: (x, residual) -> (normalised sum, sum); replicated over tp."""

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__()
        spec = context.norm
        self.eps, self.offset = spec.eps, spec.offset
        self.weight: nn.Parameter | None = None
        self.pieces = {}
        if module.has_weight:
            self.weight, self.pieces["weight"] = context.slices.weight([module], prefix)
        self.bias, bias = context.slices.bias([module], prefix)
        self.pieces |= {"bias": bias} if bias else {}
        self._add_norm = self._rms if spec.is_rms else self._layer
        self._ops = context.ops

    def _rms(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps, self.offset)

    def _layer(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._add_norm(x, residual)


class Add(nn.Module):
    """In a norm's place where there is none: (x, residual) -> (sum, sum)."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return total, total


class Scale(nn.Module):
    """Times a number, in x's dtype."""

    def __init__(self, multiplier: float) -> None:
        super().__init__()
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        return x * self.multiplier


def add_norm(module: Module | None, prefix: str, context: Context) -> nn.Module:
    return Add() if module is None else Norm(module, prefix, context)


class PostNorm(Norm):
    """A norm of what a part of the layer gives, before it is added."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self._add_norm(x, None)[0]
