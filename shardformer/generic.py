"""A pipeline stage of transformers' own layers: their linear layers are sharded, their attention is ours.

The family's forward runs as it is. What a stage does not hold passes through: the layers before its own end with the
hidden states that it received, the layers and norms after them do nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import Ops
from ..kernels.linear import bind_plain
from ..mesh.collectives import Communicator
from ..policies import Dim, GenericSpec, Module, NormSpec, TensorSpec
from ..policies.base import Rows
from ..policies.generic import STYLES, Style
from .backends import AttentionMetadata, AttentionSpec, create_backend
from .base import Stage
from .embedding import VocabParallelHead
from .interfaces import NAME, Step
from .linear import ColumnParallelLinear, Context, ParallelLinear, RowParallelLinear, Slices
from .shard import Range
from .trace import base_name, base_of, build, run, run_head, with_head
from .weights import LoadedModule, Piece

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


class GatheredLinear(ColumnParallelLinear):
    """Column-parallel, the output then made whole on every rank: [..., in] -> [..., out]."""

    def __init__(self, modules: Sequence[Module], prefix: str, context: Context) -> None:
        super().__init__(modules, prefix, context)
        (module,), slices = modules, context.slices
        self.tp = slices.tp
        self.lengths = [slices.shards.length(module.dims[0], module.sizes[0], rank) for rank in range(self.tp.size)]

    def forward(self, x: Tensor) -> Tensor:
        return gather_last(super().forward(x), self.lengths, self.tp)


class SplittingLinear(RowParallelLinear):
    """Row-parallel, of an input that is whole on every rank: [..., in] -> [..., out]."""

    def __init__(self, module: Module, prefix: str, context: Context) -> None:
        super().__init__(module, prefix, context)
        self.range = context.slices.range(module.dims[1], module.sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., slice(*self.range)].contiguous())


def gather_last(x: Tensor, lengths: Sequence[int], tp: Communicator) -> Tensor:
    """The ranks' parts of the last dim, of `lengths`, side by side; padded on their way to the longest."""
    if tp.size == 1:
        return x
    padded = torch.nn.functional.pad(x, (0, max(lengths) - x.shape[-1]))
    parts = tp.all_gather(padded)
    return torch.cat([part[..., :length] for part, length in zip(parts, lengths, strict=True)], dim=-1)


class VocabPart(nn.Module):
    """The family's embedding over this rank's rows, summed over tp; whatever it does to a row, it does here too."""

    def __init__(self, embedding: nn.Embedding, tensor: TensorSpec, slices: Slices) -> None:
        super().__init__()
        self.rows, self.tp = embedding, slices.tp
        self.start, self.stop = slices.range(Dim.VOCABULARY, tensor.shape[0])
        embedding.padding_idx = None

    @property
    def weight(self) -> Tensor:
        return self.rows.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        outside = (token_ids < self.start) | (token_ids >= self.stop)
        found: Tensor = self.rows((token_ids - self.start).masked_fill(outside, 0))
        return self.tp.all_reduce(found.masked_fill(outside.unsqueeze(-1), 0))


class PagedKernel(nn.Module):
    """Attention between a layer's projections, over the paged cache; the backend is an object made here, and kept."""

    def __init__(self, asked: AttentionSpec, backend: str, ops: Ops) -> None:
        super().__init__()
        self.store_kv = ops.store_kv
        self.backend = create_backend(backend, asked)
        self.key_cache = self.value_cache = torch.empty(0)

    def bind_cache(self, key_cache: Tensor, value_cache: Tensor) -> None:
        """Takes this layer's cache: [num_blocks, block_size, local_kv_heads, head_dim] and [..., value_dim]."""
        self.key_cache, self.value_cache = key_cache, value_cache

    def forward(self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata, sinks: Any) -> Tensor:
        """query, key, value: [1, heads, num_tokens, dim] -> [1, num_tokens, heads, value_dim]."""
        query, key, value = (x[0].transpose(0, 1).to(self.key_cache.dtype) for x in (query, key, value))
        self.store_kv(key, value, self.key_cache, self.value_cache, metadata.slots)
        plan = metadata.plans[self.backend.plan_key]
        return self.backend.forward(query.contiguous(), self.key_cache, self.value_cache, plan, sinks).unsqueeze(0)


class GroupedExperts(LoadedModule):
    """The products of transformers' stacked experts, in our grouped form; gate and activation are the family's own.

    It takes the weights of `owner`, of which it holds this rank's part; the sum over tp is the caller's.
    """

    _NAMES = {"up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}

    def __init__(self, name: str, owner: Any, parts: Mapping[str, list[TensorSpec]], context: Context) -> None:
        super().__init__()
        slices, ops = context.slices, context.ops
        if owner.has_bias and slices.tp.size > 1:
            raise ValueError(f"{name}: experts with biases are not split; use tp_size=1")
        self.first = slices.range(Dim.EXPERTS, parts[f"{name}.down_proj"][0].shape[0])[0]
        self.pieces = {}
        self.is_transposed = owner.is_transposed
        for ours, names in self._NAMES.items():
            for suffix in ("", "_bias"):
                found = [name + suffix for name in names if name + suffix in owner.pieces]
                weight = getattr(owner, found[0]) if found else None
                setattr(self, ours + suffix, weight)
                if found:
                    self.pieces[ours + suffix] = owner.pieces.pop(found[0])
                    delattr(owner, found[0])
        if owner.has_gate:
            self._activate = owner._apply_gate
        else:
            self._activate = owner.act_fn.forward
        self.after: Any = owner.post_expert_norm.forward if owner.has_post_expert_norm else None
        self.plan_experts, self.combine, self._bind = ops.plan_experts, ops.combine, ops.bind_grouped_linear

    def bind(self) -> None:
        self.num_local = len(self.up)
        for name in self._NAMES:
            weight = getattr(self, name).data
            setattr(self, name, None)
            weight = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
            setattr(self, f"{name}_product", self._bind(weight))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x: [num_tokens, hidden]; ids, weights: [num_tokens, top_k], the router's. Returns x's shape."""
        plan = self.plan_experts(ids.int(), self.first, self.num_local)
        rows = self._activate(self.up_product(x, self.up_bias, plan, True))
        rows = self.down_product(rows, self.down_bias, plan, False)
        return self.combine(rows if self.after is None else self.after(rows), weights.float(), plan)


@dataclass(frozen=True)
class StageStep:
    """What the layers of a stage are handed beside their input."""

    metadata: AttentionMetadata
    received: Tensor | None  # [1, num_tokens, hidden] from the stage before

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        out: Tensor = module.paged(query, key, value, self.metadata, asked.get("s_aux"))
        return out


class PassThrough(nn.Module):
    """In the place of a layer that another stage holds: gives its input, or what this stage received.

    outputs: how many the layer gives, the first of them hidden states; None: those alone, not in a tuple.
    """

    def __init__(self, layer: nn.Module, gives_received: bool, outputs: int | None) -> None:
        super().__init__()
        self.gives_received, self.outputs = gives_received, outputs
        for name, value in vars(layer).items():  # models look at some of them
            if isinstance(value, str | int | float) and name not in vars(self):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.gives_received and kwargs["step"].received is not None:
            hidden = kwargs["step"].received
        return hidden if self.outputs is None else (hidden,) + (None,) * (self.outputs - 1)


class GenericStage(Stage):
    """A stage of transformers' layers."""

    def __init__(
        self,
        spec: GenericSpec,
        layers: Range,
        slices: Slices,
        ops: Ops,
        *,
        backend: str,
        max_model_len: int,
        device: torch.device,
        block_size: int | None = None,
    ) -> None:
        super().__init__(spec, layers, slices.dtype, device)
        self.max_model_len = max_model_len
        model = build(spec.config, spec.architecture, slices.dtype)
        self._paths = [f"{spec.prefix}.{index}.{spec.attention}" for index in range(*layers)]
        _keep_wide(model, slices.dtype)
        _cut(model, spec, layers)
        context = Context(slices, ops, NormSpec(is_rms=True, eps=0.0), backend, device, block_size)
        with torch.device("meta"):
            _shard(model, spec, context, self.is_first, self.is_last)
        for index, path in zip(range(*layers), self._paths, strict=True):
            attention = model.get_submodule(path)
            _localise(attention, spec, index, slices)
            if not spec.hands_on:
                layer = model.get_submodule(f"{spec.prefix}.{index}")
                layer.register_forward_pre_hook(partial(_tell, attention), with_kwargs=True)
        self.model = model
        self.base = base_of(model)
        self._bind_attention(backend, ops, block_size)
        _fill_buffers(model, device)
        # The family's own way from hidden states to logits. In a list: its modules are those of `model`.
        self._head = [with_head(model, spec.prefix, {})]
        model.config._attn_implementation = model.config._experts_implementation = NAME

    def _bind_attention(self, backend: str, ops: Ops, block_size: int | None) -> None:
        """Asks each layer what attention it calls, with this rank's heads."""
        spec = self.spec
        width = None if self.is_first else (spec.hidden_size, self._embedding_width)
        trace = run(self.model, spec.max_position_embeddings, width)
        if [call.module for call in trace.calls] != self._paths:
            raise ValueError(f"{spec.architecture}: its layers attend in another order once they are divided")
        for call in trace.calls:
            self.model.get_submodule(call.module).paged = PagedKernel(
                AttentionSpec(
                    num_heads=call.num_heads,
                    num_kv_heads=call.num_kv_heads,
                    head_dim=call.head_dim,
                    value_dim=None if call.value_dim == call.head_dim else call.value_dim,
                    scale=call.scale,
                    dtype=self.dtype,
                    device=self.device,
                    window=call.window,
                    softcap=call.softcap,
                    has_sinks=call.has_sinks,
                    block_size=block_size,
                ),
                backend,
                ops,
            )

    @property
    def _embedding_width(self) -> int:
        return next(t.shape[1] for t in self.spec.first if t.name == f"{self.spec.embedding}.weight")

    @property
    def attentions(self) -> Iterator[PagedKernel]:
        for path in self._paths:
            yield self.model.get_submodule(path).paged  # type: ignore[misc]

    def prove(self) -> None:
        prove_apart(self, self.max_model_len)

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """What it gives on the last stage is normalised."""
        return self.run(x, metadata.positions, partial(StageStep, metadata))

    def run(self, x: Tensor, positions: Tensor, make_step: Callable[[Tensor | None], Step]) -> Tensor:
        """`forward` with any kind of step, which is made of what the stage received."""
        x = x.unsqueeze(0)
        if self.is_first:
            inputs = {"input_ids": x}
        else:
            width = self._embedding_width
            inputs = {"inputs_embeds": x if width == x.shape[-1] else x.new_zeros(*x.shape[:2], width)}
        step = make_step(None if self.is_first else x)
        out: Tensor = self.base(
            **inputs, position_ids=positions.unsqueeze(0), use_cache=False, step=step
        ).last_hidden_state
        return out.squeeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        return run_head(self._head[0], hidden.unsqueeze(0)).squeeze(0)


# ---- making a stage of a model ---------------------------------------------------------------------------------------


def _keep_wide(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters that the family keeps in float32 whatever the dtype."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    more = getattr(model, "_keep_in_fp32_modules", None) or ()
    patterns = [*strict, *(more if dtype is torch.float16 else ())] if dtype is not torch.float32 else []
    for name, parameter in model.named_parameters():
        if any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in patterns):
            parameter.data = parameter.data.float()


def _cut(model: nn.Module, spec: GenericSpec, layers: Range) -> None:
    """Puts what other stages hold out of the model."""
    held = model.get_submodule(spec.prefix)
    for index in range(spec.num_layers):
        if not layers[0] <= index < layers[1]:
            held[index] = PassThrough(held[index], index == layers[0] - 1, spec.layer_outputs)
    if layers[0] > 0:
        model.set_submodule(spec.embedding, nn.Identity())
    if layers[1] < spec.num_layers:
        outside = [name for name, module in model.named_children() if name != base_name(model)]
        for name in (*spec.after_layers, *outside):
            model.set_submodule(name, nn.Identity())


def _shard(model: nn.Module, spec: GenericSpec, context: Context, is_first: bool, is_last: bool) -> None:
    """Gives every module this rank's part of its parameters, and the pieces that fill them."""
    slices = context.slices
    parts: dict[str, list[TensorSpec]] = {}
    for tensor in spec.tensors():
        parts.setdefault(tensor.name, []).append(tensor)
    embedding: VocabPart | None = None
    if is_first:
        rows = model.get_submodule(spec.embedding)
        (tensor,) = parts[f"{spec.embedding}.weight"]
        embedding = VocabPart(rows, tensor, slices)
        _hold(rows, "weight", [tensor], slices)
        model.set_submodule(spec.embedding, embedding)
    if is_last:
        source = f"{spec.embedding if spec.tied_embeddings else spec.lm_head}.weight"
        (tensor,) = parts[source]
        module = Module(spec.lm_head, tensor.dims, tensor.shape, bias=f"{spec.lm_head}.bias" in parts)
        rows = embedding.rows if embedding is not None and spec.tied_embeddings else None
        head = VocabParallelHead(module, context, rows)
        head.pieces["weight"] = [replace(piece, tensor=source) for piece in head.pieces["weight"]]
        model.set_submodule(spec.lm_head, head)
    ends = {spec.embedding, spec.lm_head, f"{spec.embedding}.rows"}
    for name, module in list(model.named_modules()):
        if name in ends:
            continue
        style = STYLES[spec.styles.get(name, "replicate")]
        is_split = style.splits_input or style.splits_output
        if style.is_summed:
            module.register_forward_hook(partial(_sum, slices.tp))
        if is_split and type(module) is nn.Linear and module.weight.dtype == slices.dtype:
            model.set_submodule(name, _linear(name, parts, style, context))
            continue
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if own not in module._non_persistent_buffers_set:
                _hold(module, own, parts[f"{name}.{own}"], slices)
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):  # see `use_experts_implementation`
            module.experts = GroupedExperts(name, module, parts, context)


def _tell(attention: nn.Module, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    attention.step = kwargs["step"]


def _sum(tp: Communicator, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return tp.all_reduce(out)


def _linear(name: str, parts: dict[str, list[TensorSpec]], style: Style, context: Context) -> nn.Module:
    weights, bias = parts[f"{name}.weight"], f"{name}.bias" in parts
    total, first = sum(weight.shape[0] for weight in weights), 0
    modules = []
    for weight in weights:
        rows = Rows(first, weight.shape[0], total) if len(weights) > 1 else None
        modules.append(Module(name, weight.dims, weight.shape, bias, rows))
        first += weight.shape[0]
    linear: ParallelLinear
    if style.splits_input:
        assert len(modules) == 1
        linear = (SplittingLinear if style.takes_whole else RowParallelLinear)(modules[0], "", context)
    else:
        linear = (GatheredLinear if style.is_gathered else ColumnParallelLinear)(modules, "", context)
    assert linear.weight is not None
    linear.product = bind_plain(linear.weight)  # for the trial; `bind` takes a better one
    return linear


def _hold(module: nn.Module, name: str, parts: Sequence[TensorSpec], slices: Slices) -> None:
    """Makes a parameter (or buffer) of this rank's part of a tensor."""
    blank, along = getattr(module, name), parts[0].along
    pieces, before, start = [], 0, 0
    shape: list[int] = []
    for part in parts:
        ranges = [slices.range(dim, size) for dim, size in zip(part.dims, part.shape, strict=True)]
        if not ranges:
            pieces.append(Piece(part.name, ()))
            break
        shape = [last - first for first, last in ranges]
        first, last = ranges[along]
        ranges[along] = (before + first, before + last)
        pieces.append(Piece(part.name, tuple(ranges), (0,) * along + (start,)))
        before, start = before + part.shape[along], start + last - first
    if shape:
        shape[along] = start
    vars(module).setdefault("pieces", {})[name] = pieces
    setattr(module, name, nn.Parameter(torch.empty(shape, dtype=blank.dtype, device="meta"), requires_grad=False))


def _localise(attention: Any, spec: GenericSpec, index: int, slices: Slices) -> None:
    """Tells an attention module how many heads it has on this rank."""
    if spec.kinds[index].is_replicated:
        return
    shards, rank = slices.shards, slices.tp.rank
    heads, kv_heads = (stop - start for start, stop in (shards.heads[rank], shards.kv_heads[rank]))
    for names, whole, local in ((_HEADS, spec.num_heads, heads), (_KV_HEADS, spec.num_kv_heads, kv_heads)):
        for name in names:
            if getattr(attention, name, None) == whole:
                setattr(attention, name, local)
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads // kv_heads


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Makes what is in no checkpoint, such as rotary frequencies, as transformers does once it has loaded one."""
    makers = {name: module for name, module in model.named_modules() if hasattr(module, "_init_weights")}
    for path, module in model.named_modules():
        names = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        if not names:
            continue
        maker = max((name for name in makers if path == name or not name or path.startswith(f"{name}.")), key=len)
        made = []
        for poison in (0, 1):
            for name in names:
                setattr(module, name, torch.full_like(module._buffers[name], poison, device=device))
            makers[maker]._init_weights(module)
            made.append([module._buffers[name].clone() for name in names])
        for name, first, second in zip(names, *made, strict=True):
            if not torch.equal(first, second):
                raise ValueError(f"{type(model).__name__} is not supported: nothing says what {path}.{name} holds")
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):  # frequencies do not change within the length that the spec allows
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")


# ---- proving that it is one ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """A step in which each token attends to itself alone."""

    received: Tensor | None  # see StageStep

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@torch.inference_mode()
def prove_apart(stage: GenericStage, longest: int) -> None:
    """Proves that tokens meet in attention only, and have the positions that they are given: without attention, each
    keeps its hidden states when they change places and others are replaced. Raises ValueError.

    Of most tokens, since a router may send one elsewhere for a rounding error.
    """
    random = torch.Generator().manual_seed(0)
    count, kept = 12, 8
    positions = torch.randint(longest, (count + 4,), generator=random)
    if stage.is_first:
        tokens = torch.randint(stage.spec.vocab_size, (count + 4,), generator=random)
    else:
        tokens = torch.randn(count + 4, stage.spec.hidden_size, generator=random).to(stage.dtype)
    order = torch.randperm(count, generator=random) + 4  # of the second run: tokens 4 to 15, where the first has 0 to 11
    first, second = (
        stage.run(tokens[rows].to(stage.device), positions[rows].to(stage.device), Apart).float()
        for rows in (torch.arange(count), order)
    )
    places = [int((order == row).nonzero()) for row in range(4, 4 + kept)]
    expected, found = first[4 : 4 + kept], second[places]
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()
    if not error < (1e-3 if stage.dtype is torch.float32 else 5e-2):
        raise ValueError(
            f"{stage.spec.architecture} is not supported: its layers mix tokens outside attention, or count positions by "
            f"themselves (hidden states change by {error:.1%} when tokens change places)"
        )
