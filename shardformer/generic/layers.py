"""What takes the place of transformers' modules: linear layers, embedding, experts, attention, absent layers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.eager_moe import GroupedLinear
from ...kernels.linear import bind_plain
from ...policies import Dim, Module, TensorSpec
from ...policies.base import Rows
from ...policies.generic import Style
from ..backends import AttentionMetadata, AttentionSpec, create_backend
from ..linear import ColumnParallelLinear, Context, ParallelLinear, RowParallelLinear, Slices
from ..weights import LoadedModule, Piece
from .interfaces import Ended

Parts = Mapping[str, Sequence[TensorSpec]]
"""A checkpoint's tensors by name; several parts where they lie one after the other in one."""


class GatheredLinear(ColumnParallelLinear):
    """Column-parallel, the output then made whole on every rank: [..., in] -> [..., out]."""

    def __init__(self, modules: Sequence[Module], prefix: str, context: Context) -> None:
        super().__init__(modules, prefix, context)
        (module,), shards, self.tp = modules, context.slices.shards, context.slices.tp
        self.lengths = [shards.length(module.dims[0], module.sizes[0], rank) for rank in range(self.tp.size)]

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        padded = nn.functional.pad(out, (0, max(self.lengths) - out.shape[-1]))
        parts = self.tp.all_gather(padded)
        return torch.cat([part[..., :length] for part, length in zip(parts, self.lengths, strict=True)], dim=-1)


class SplittingLinear(RowParallelLinear):
    """Row-parallel, of an input that is whole on every rank: [..., in] -> [..., out]."""

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__(module, prefix, context)
        self.range = context.slices.range(module.dims[1], module.sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., slice(*self.range)].contiguous())


def parallel_linear(name: str, parts: Parts, style: Style, context: Context) -> ParallelLinear:
    """What a style makes of the linear layer `name`."""
    weights, bias = parts[f"{name}.weight"], f"{name}.bias" in parts
    total, first, modules = sum(weight.shape[0] for weight in weights), 0, []
    for weight in weights:
        rows = Rows(first, weight.shape[0], total) if len(weights) > 1 else None
        modules.append(Module(name, weight.dims, weight.shape, bias, rows))
        first += weight.shape[0]
    linear: ParallelLinear
    if style.splits_input:
        (module,) = modules
        linear = (SplittingLinear if style.takes_whole else RowParallelLinear)(module, "", context)
    else:
        linear = (GatheredLinear if style.is_gathered else ColumnParallelLinear)(modules, "", context)
    assert linear.weight is not None
    linear.product = bind_plain(linear.weight)  # for the trial run; `bind` takes a better one
    return linear


class VocabPart(nn.Module):
    """The family's embedding over this rank's rows, summed over tp; whatever it does to a row, it does here too."""

    def __init__(self, embedding: nn.Embedding, name: str, tensor: TensorSpec, slices: Slices) -> None:
        super().__init__()
        self.rows, self.tp = embedding, slices.tp
        self.start, self.stop = slices.range(Dim.VOCABULARY, tensor.shape[0])
        embedding.padding_idx = None
        hold(embedding, {f"{name}.weight": [tensor]}, name, slices)

    @property
    def weight(self) -> Tensor:
        return self.rows.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        outside = (token_ids < self.start) | (token_ids >= self.stop)
        found: Tensor = self.rows((token_ids - self.start).masked_fill(outside, 0))
        return self.tp.all_reduce(found.masked_fill(outside.unsqueeze(-1), 0))


class GroupedExperts(LoadedModule):
    """The products of transformers' stacked experts in our grouped form; gate and activation are the family's own.

    Takes the parameters of `owner`, which hold this rank's part already; the sum over tp is the caller's.
    """

    def __init__(self, name: str, owner: Any, parts: Parts, context: Context) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        if owner.has_bias and slices.tp.size > 1:
            raise ValueError(f"{name}: experts with biases cannot be divided; use tp_size=1")
        self.first = slices.range(Dim.EXPERTS, parts[f"{name}.down_proj"][0].shape[0])[0]
        self.is_transposed = owner.is_transposed
        self.pieces = {}
        for ours, theirs in (("up", "gate_up_proj" if owner.has_gate else "up_proj"), ("down", "down_proj")):
            for suffix in ("", "_bias"):
                has = theirs + suffix in owner.pieces
                setattr(self, ours + suffix, getattr(owner, theirs + suffix) if has else None)
                if has:
                    self.pieces[ours + suffix] = owner.pieces.pop(theirs + suffix)
                    delattr(owner, theirs + suffix)
        # Functions, not modules: those are the owner's.
        self._activate = owner._apply_gate if owner.has_gate else owner.act_fn.forward
        has_norm = getattr(owner, "has_post_expert_norm", False)  # older transformers say it of none
        self._finish = owner.post_expert_norm.forward if has_norm else lambda rows: rows
        self.up: nn.Parameter | None
        self.down: nn.Parameter | None
        self.up_bias: nn.Parameter | None
        self.down_bias: nn.Parameter | None
        self._plan, self._combine, self._bind = ops.plan_experts, ops.combine, ops.bind_grouped_linear
        self.up_product: GroupedLinear
        self.down_product: GroupedLinear

    def bind(self) -> None:
        assert self.up is not None
        self.num_local = len(self.up)
        for name in ("up", "down"):
            weight = getattr(self, name).data
            setattr(self, name, None)
            weight = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            setattr(self, f"{name}_product", self._bind(weight))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x: [num_tokens, hidden]; ids, weights: [num_tokens, top_k], the router's. Returns x's shape."""
        plan = self._plan(ids.int(), self.first, self.num_local)
        rows = self._activate(self.up_product(x, self.up_bias, plan, True))
        return self._combine(self._finish(self.down_product(rows, self.down_bias, plan, False)), weights.float(), plan)


class PagedKernel(nn.Module):
    """Attention between a layer's projections, over the paged cache; the backend is an object made here, and kept."""

    def __init__(self, asked: AttentionSpec, backend: str, context: Context) -> None:
        super().__init__()
        self.store_kv = context.ops.store_kv
        self.backend = create_backend(backend, asked)
        self.key_cache = self.value_cache = torch.empty(0)

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Takes this layer's cache, of the spec's `caches`."""
        self.key_cache, self.value_cache = key_cache, value_cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata, sinks: Any) -> Tensor:
        """query, key, value: [1, heads, num_tokens, dim] -> [1, num_tokens, heads, value_dim]."""
        query, key, value = (x[0].transpose(0, 1).to(self.key_cache.dtype) for x in (query, key, value))
        self.store_kv(key, value, self.key_cache, self.value_cache, metadata.slots)
        plan = metadata.plans[self.backend.plan_key]
        return self.backend.forward(query.contiguous(), self.key_cache, self.value_cache, plan, sinks).unsqueeze(0)


class Absent(nn.Module):
    """In the place of a layer that another stage holds."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # models look at some of them
            if isinstance(value, str | int | float) and name not in vars(self):
                setattr(self, name, value)


class Before(Absent):
    """A layer before the stage's own gives what the stage received.

    outputs: how many the layer gives in a tuple, hidden states first; None: those alone.
    """

    def __init__(self, layer: nn.Module, outputs: int | None) -> None:
        super().__init__(layer)
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = kwargs["step"].received
        return hidden if self.outputs is None else (hidden,) + (None,) * (self.outputs - 1)


class After(Absent):
    """A layer after the stage's own ends the model's forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise Ended(args[0] if args else kwargs["hidden_states"])


def hold(module: nn.Module, parts: Parts, name: str, slices: Slices) -> None:
    """Makes a module's own parameters, and the buffers that a checkpoint has, this rank's, with what fills them."""
    pieces: dict[str, list[Piece]] = {}
    vars(module)["pieces"] = pieces
    for own, blank in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if own not in module._non_persistent_buffers_set:
            shape, pieces[own] = _held(parts[f"{name}.{own}"], slices)
            setattr(module, own, nn.Parameter(blank.new_empty(shape), requires_grad=False))


def _held(parts: Sequence[TensorSpec], slices: Slices) -> tuple[list[int], list[Piece]]:
    """The shape of this rank's part of a tensor, and the pieces that it is made of."""
    pieces, before, start = [], 0, 0
    shape: list[int] = []
    for part in parts:
        ranges = [slices.range(dim, size) for dim, size in zip(part.dims, part.shape, strict=True)]
        if not ranges:
            return [], [Piece(part.name, ())]
        shape, (first, last) = [stop - start for start, stop in ranges], ranges[part.along]
        ranges[part.along] = before + first, before + last
        pieces.append(Piece(part.name, tuple(ranges), (0,) * part.along + (start,)))
        before, start = before + part.shape[part.along], start + last - first
        shape[part.along] = start
    return shape, pieces
