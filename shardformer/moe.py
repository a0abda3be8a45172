"""Mixture of experts: of many gated MLPs each token uses a few, which a router chooses (Shazeer et al. 2017).

Over tp either each expert is split, as an MLP is, or ranks hold whole experts (`Shards.expert_parallel`), unevenly or
none where they do not divide. Either way every rank sees every token and routes it alike, computes what its weights
contribute, and one sum over tp, shared experts included, makes the output.
"""

import torch
from torch import Tensor, nn

from ..kernels.eager import activation_kind
from ..kernels.eager_moe import GroupedLinear, Routing
from ..kernels.linear import Linear
from ..policies import Dim, MoESpec, RouterSpec, SharedExpertSpec
from .linear import Context
from .shard import Range
from .weights import LoadedModule, Piece


def _blank(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Router(LoadedModule):
    """[num_tokens, hidden] -> (weights float32, expert ids int32), both [num_tokens, top_k]; replicated over tp."""

    def __init__(self, spec: RouterSpec, num_experts: int, hidden: int, prefix: str, context: Context) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        dtype = torch.float32 if spec.float32 else slices.dtype
        experts = (0, num_experts)
        self.pieces = {"weight": [Piece(f"{prefix}{spec.name}.weight", (experts, (0, hidden)))]}
        self.weight: nn.Parameter | None = _blank((num_experts, hidden), dtype)
        self.bias: nn.Parameter | None = None
        self.correction: nn.Parameter | None = None
        if spec.bias:
            self.pieces["bias"] = [Piece(f"{prefix}{spec.name}.bias", (experts,))]
            self.bias = _blank((num_experts,), dtype)
        if spec.correction is not None:
            self.pieces["correction"] = [Piece(f"{prefix}{spec.correction}", (experts,))]
            self.correction = _blank((num_experts,), torch.float32)
        self.routing = Routing(
            top_k=spec.top_k,
            scoring=spec.scoring,
            normalise=spec.normalise,
            scale=spec.scale,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            group_score=spec.group_score,
        )
        self.dtype = dtype
        self.route = ops.route
        self._bind_linear = ops.bind_linear
        self.product: Linear

    def bind(self) -> None:
        assert self.weight is not None
        self.product = self._bind_linear(self.weight.data)
        self.weight = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.product(x.to(self.dtype), self.bias), self.routing, self.correction)


class Experts(LoadedModule):
    """This rank's part of the routed experts; its outputs' sum over tp is theirs.

    Products take weights [local experts, out, in]; those that the checkpoint has transposed are turned once they are
    loaded. A bias of the down product, of which no rank has a part, is that of the rank which has the expert, or of
    rank 0.
    """

    def __init__(self, spec: MoESpec, prefix: str, context: Context) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        rank, i, h = slices.tp.rank, spec.intermediate_size, spec.hidden_size
        experts = slices.range(Dim.EXPERTS, spec.num_experts)
        part = slices.range(Dim.EXPERT_INTERMEDIATE, i)
        self.first, self.num_local, width = experts[0], experts[1] - experts[0], part[1] - part[0]
        ups = [(2 * part[0], 2 * part[1])] if spec.interleaved else [part, (i + part[0], i + part[1])]
        self.transposed = spec.transposed

        def stacked(name: str, out: Range, into: Range, row: int = 0) -> Piece:
            """Rows `row` on of each expert's matrix."""
            tensor = f"{prefix}{spec.name}.{name}"
            if spec.transposed:
                return Piece(tensor, (experts, into, out), (0, 0, row))
            return Piece(tensor, (experts, out, into), (0, row))

        def matrix(out: int, into: int) -> nn.Parameter:
            return _blank((self.num_local, into, out) if spec.transposed else (self.num_local, out, into), slices.dtype)

        self.pieces = {
            "gate_up": [stacked("gate_up_proj", up, (0, h), i * width) for i, up in enumerate(ups)],
            "down": [stacked("down_proj", (0, h), part)],
        }
        self.gate_up: nn.Parameter | None = matrix(2 * width, h)
        self.down: nn.Parameter | None = matrix(h, width)
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if spec.bias:
            bias = f"{prefix}{spec.name}.gate_up_proj_bias"
            self.pieces["gate_up_bias"] = [Piece(bias, (experts, up), (0, i * width)) for i, up in enumerate(ups)]
            self.gate_up_bias = _blank((self.num_local, 2 * width), slices.dtype)
            if slices.shards.expert_parallel or rank == 0:
                self.pieces["down_bias"] = [Piece(f"{prefix}{spec.name}.down_proj_bias", (experts, (0, h)))]
                self.down_bias = _blank((self.num_local, h), slices.dtype)
        self.plan_experts, self.combine = ops.plan_experts, ops.combine
        self.activation = ops.gated_activation(activation_kind(spec.activation))
        self._bind_grouped_linear = ops.bind_grouped_linear
        self.gate_up_product: GroupedLinear
        self.down_product: GroupedLinear

    def bind(self) -> None:
        assert self.gate_up is not None and self.down is not None
        gate_up, self.gate_up = self.gate_up.data, None
        self.gate_up_product = self._bind_grouped_linear(self._out_first(gate_up))
        del gate_up  # before the other is copied
        down, self.down = self.down.data, None
        self.down_product = self._bind_grouped_linear(self._out_first(down))

    def _out_first(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).contiguous() if self.transposed else weight

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x: [num_tokens, hidden]; weights, ids: the router's. Returns [num_tokens, hidden]."""
        plan = self.plan_experts(ids, self.first, self.num_local)
        rows = self.activation(self.gate_up_product(x, self.gate_up_bias, plan, True))
        return self.combine(self.down_product(rows, self.down_bias, plan, False), weights, plan)


class SharedExpert(LoadedModule):
    """This rank's part of the MLP that all tokens use; its outputs' sum over tp is the MLP's."""

    def __init__(self, spec: SharedExpertSpec, moe: MoESpec, prefix: str, context: Context) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        inner, hidden = f"{prefix}{spec.name}.", (0, moe.hidden_size)
        part = slices.range(Dim.INTERMEDIATE, spec.intermediate_size)
        width, h = part[1] - part[0], moe.hidden_size
        ups = {"gate_proj": 0, "up_proj": width}  # first row
        self.pieces = {
            "gate_up": [Piece(f"{inner}{name}.weight", (part, hidden), (row,)) for name, row in ups.items()],
            "down": [Piece(f"{inner}down_proj.weight", (hidden, part))],
        }
        self.gate_up: nn.Parameter | None = _blank((2 * width, h), slices.dtype)
        self.down: nn.Parameter | None = _blank((h, width), slices.dtype)
        self.gate_up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        self.gate: nn.Parameter | None = None
        if spec.bias:
            self.pieces["gate_up_bias"] = [Piece(f"{inner}{name}.bias", (part,), (row,)) for name, row in ups.items()]
            self.gate_up_bias = _blank((2 * width,), slices.dtype)
            if slices.tp.rank == 0:
                self.pieces["down_bias"] = [Piece(f"{inner}down_proj.bias", (hidden,))]
                self.down_bias = _blank((h,), slices.dtype)
        if spec.gate is not None:
            self.pieces["gate"] = [Piece(f"{prefix}{spec.gate}.weight", ((0, 1), hidden))]
            self.gate = _blank((1, h), slices.dtype)
        self._bind_up, self._bind_down = ops.bind_gated_linear, ops.bind_linear
        self._kind = activation_kind(moe.activation)
        self.up_product: Linear  # activated
        self.down_product: Linear

    def bind(self) -> None:
        assert self.gate_up is not None and self.down is not None
        self.up_product = self._bind_up(self.gate_up.data, self._kind)
        self.down_product = self._bind_down(self.down.data)
        self.gate_up = self.down = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.down_product(self.up_product(x, self.gate_up_bias), self.down_bias)
        return out if self.gate is None else out * torch.sigmoid(x @ self.gate.T)


class MixtureOfExperts(nn.Module):
    """[num_tokens, hidden] -> [num_tokens, hidden]: each token's experts, weighted, and the shared one; one sum over
    tp, left to the caller if `partial`."""

    def __init__(self, spec: MoESpec, prefix: str, context: Context, partial: bool = False) -> None:
        super().__init__()
        self.tp, self.partial = context.slices.tp, partial
        self.router = Router(spec.router, spec.num_experts, spec.hidden_size, prefix, context)
        self.experts = Experts(spec, prefix, context)
        self.shared = None if spec.shared is None else SharedExpert(spec.shared, spec, prefix, context)

    def forward(self, x: Tensor) -> Tensor:
        out = self.experts(x, *self.router(x))
        out = out if self.shared is None else out + self.shared(x)
        return out if self.partial else self.tp.all_reduce(out)
