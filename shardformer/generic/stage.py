"""A pipeline stage of transformers' own layers: their linear layers are sharded, their attention is ours.

The family's forward runs as it is. In the place of layers that a stage does not hold, those before its own give the
hidden states that it received, and the first after its own ends the forward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import Ops
from ...mesh.collectives import Communicator
from ...policies import Dim, GenericSpec, Module, NormSpec, TensorSpec
from ...policies.generic import STYLES
from ..backends import AttentionMetadata, AttentionSpec
from ..base import Stage, pick
from ..embedding import VocabParallelHead
from ..linear import Context, Slices
from ..shard import Range
from .head import head_of, run_head
from .interfaces import NAME, Ended, Step, tell
from .layers import Absent, After, Before, GroupedExperts, PagedKernel, Parts, VocabPart, hold, parallel_linear
from .proof import prove
from .trace import base_name, build, fix_frequencies, is_kept_wide, run

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_query_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class StageStep:
    """What the layers of a stage are handed beside their input; a `Step`."""

    metadata: AttentionMetadata
    received: Tensor | None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        out: Tensor = module.paged(query, key, value, self.metadata, asked.get("s_aux"))
        return out


class GenericStage(Stage):
    """A stage of transformers' layers."""

    spec: GenericSpec
    supports_graphs = False  # what a family's forward asks of the device, nobody has looked through

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
        self.model = build(spec.config, spec.model_class, slices.dtype)
        self._paths = [f"{spec.prefix}.{index}.{spec.attention}" for index in range(*layers)]
        context = Context(slices, ops, NormSpec(is_rms=True, eps=0.0), backend, device, block_size)
        _keep_wide(self.model, slices.dtype)
        cut(self.model, spec, layers)
        with torch.device("meta"):
            _shard(self.model, spec, context, self.is_first, self.is_last)
        for index, path in zip(range(*layers), self._paths, strict=True):
            attention = self.model.get_submodule(path)
            if not spec.kinds[index].is_replicated:
                _localise(attention, spec, slices)
            if not spec.hands_on:
                layer = self.model.get_submodule(f"{spec.prefix}.{index}")
                layer.register_forward_pre_hook(partial(tell, attention), with_kwargs=True)
        self.base = self.model.get_submodule(base_name(self.model))
        self._bind_attention(context)
        _fill_buffers(self.model, device)
        fix_frequencies(self.model)  # they are what they are within the length that the spec allows
        self._head = (head_of(self.model, spec.prefix),)  # in a tuple: its modules are those of `model`
        self.model.config._attn_implementation = self.model.config._experts_implementation = NAME

    def _bind_attention(self, context: Context) -> None:
        """Asks each layer what attention it calls, with this rank's heads."""
        spec = self.spec
        received = None if self.is_first else (spec.hidden_size, spec.embedding_size)
        for call in run(self.model, spec.max_position_embeddings, received).calls:
            asked = AttentionSpec(
                num_heads=call.num_heads,
                num_kv_heads=call.num_kv_heads,
                head_dim=call.head_dim,
                value_dim=call.value_dim,
                scale=call.scale,
                dtype=self.dtype,
                device=self.device,
                window=call.window,
                softcap=call.softcap,
                has_sinks=call.has_sinks,
                block_size=context.block_size,
            )
            self.model.get_submodule(call.module).paged = PagedKernel(asked, context.backend, context)

    @property
    def attentions(self) -> Iterator[PagedKernel]:
        for path in self._paths:
            yield self.model.get_submodule(path).paged

    def prove(self) -> None:
        prove(self, self.max_model_len)

    def forward(self, x: Tensor, metadata: AttentionMetadata) -> Tensor:
        """What it gives on the last stage is normalised."""
        return pick(self.run(x, metadata.positions, partial(StageStep, metadata)), metadata.wanted)

    def run(
        self, x: Tensor, positions: Tensor, make_step: Callable[[Tensor | None], Step], embedding: float = 0.0
    ) -> Tensor:
        """`forward` with any kind of step, which is made of what the stage received.

        embedding: what a later stage takes for embedded tokens, in each element; nothing may depend on it.
        """
        x = x.unsqueeze(0)
        if self.is_first:
            inputs = {"input_ids": x}
        else:
            inputs = {"inputs_embeds": x.new_full((*x.shape[:2], self.spec.embedding_size), embedding)}
        step = make_step(None if self.is_first else x)
        try:
            hidden: Tensor = self.base(
                **inputs, position_ids=positions.unsqueeze(0), use_cache=False, step=step
            ).last_hidden_state
        except Ended as ended:
            hidden = ended.hidden
        return hidden.squeeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        (head,) = self._head
        return run_head(head, hidden.unsqueeze(0)).squeeze(0)

    def last_hidden(self, hidden: Tensor) -> Tensor:
        return hidden


# ---- making a stage of a model ---------------------------------------------------------------------------------------


def cut(model: Any, spec: GenericSpec, layers: Range) -> None:
    """Puts what other stages hold out of the model."""
    held = model.get_submodule(spec.prefix)
    for index in range(spec.num_layers):
        if not layers[0] <= index < layers[1]:
            held[index] = Before(held[index], spec.layer_outputs) if index < layers[0] else After(held[index])
    if layers[0] > 0:
        model.set_submodule(spec.embedding, nn.Identity())
    if layers[1] < spec.num_layers:
        outside = [name for name, _ in model.named_children() if name != base_name(model)]
        for name in (*spec.after_layers, *outside):
            model.set_submodule(name, nn.Identity())


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Makes float32 what the family keeps so: parameters, and buffers that a checkpoint has."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_kept_wide(model, name, dtype):
            tensor.data = tensor.data.float()


def _shard(model: Any, spec: GenericSpec, context: Context, is_first: bool, is_last: bool) -> None:
    """Gives every module this rank's part of its parameters, and the pieces that fill them."""
    slices = context.slices
    parts: dict[str, list[TensorSpec]] = {}
    for tensor in spec.tensors():
        parts.setdefault(tensor.name, []).append(tensor)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name not in (spec.embedding, spec.lm_head) and not isinstance(module, Absent)
    }
    rows = None
    if is_first:
        rows = model.get_submodule(spec.embedding)
        (tensor,) = parts[f"{spec.embedding}.weight"]
        model.set_submodule(spec.embedding, VocabPart(rows, spec.embedding, tensor, slices))
    if is_last:
        model.set_submodule(spec.lm_head, _head(spec, parts, context, rows))
    for name, module in modules.items():
        style = STYLES[spec.styles.get(name, "replicate")]
        if style.is_summed:
            module.register_forward_hook(partial(_sum, slices.tp))
        if type(module) is nn.Linear and style.is_split and module.weight.dtype == slices.dtype:
            model.set_submodule(name, parallel_linear(name, parts, style, context))
            continue
        hold(module, parts, name, slices)
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):  # transformers' use_experts_implementation
            module.experts = GroupedExperts(name, module, parts, context)
        elif slices.shards.expert_parallel and slices.tp.size > 1 and _has_experts(module, name, parts):
            raise ValueError(f"expert_parallel=True: {name} does not run experts apart; use expert_parallel=False")


def _head(spec: GenericSpec, parts: Parts, context: Context, rows: Any) -> VocabParallelHead:
    """rows: the embedding, where it is on this stage."""
    weight, bias = (spec.tied.get(name, name) for name in (f"{spec.lm_head}.weight", f"{spec.lm_head}.bias"))
    (tensor,) = parts[weight]
    module = Module(spec.lm_head, tensor.dims, tensor.shape, bias in parts)
    head = VocabParallelHead(module, context, rows if spec.tied_embeddings else None, widens=True)
    for pieces in head.pieces.values():
        pieces[:] = [replace(piece, tensor=spec.tied.get(piece.tensor, piece.tensor)) for piece in pieces]
    return head


def _has_experts(module: nn.Module, name: str, parts: Parts) -> bool:
    own = [parts[f"{name}.{own}"] for own, _ in module.named_parameters(recurse=False)]
    return any(Dim.EXPERTS in tensor.dims for tensors in own for tensor in tensors)


def _sum(tp: Communicator, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return tp.all_reduce(out)


def _localise(attention: Any, spec: GenericSpec, slices: Slices) -> None:
    """Tells an attention module how many heads it has on this rank."""
    shards, rank = slices.shards, slices.tp.rank
    heads, kv_heads = (stop - start for start, stop in (shards.heads[rank], shards.kv_heads[rank]))
    for names, whole, local in ((_HEADS, spec.num_heads, heads), (_KV_HEADS, spec.num_kv_heads, kv_heads)):
        for name in names:
            if getattr(attention, name, None) == whole:
                setattr(attention, name, local)
    if hasattr(attention, "num_key_value_groups"):
        attention.num_key_value_groups = heads // kv_heads


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Makes what is in no checkpoint, such as rotary frequencies, as transformers does once it has loaded one."""
    makers = {name: module for name, module in model.named_modules() if hasattr(module, "_init_weights")}
    for path, module in model.named_modules():
        names = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        maker = max((name for name in makers if not name or f"{path}.".startswith(f"{name}.")), key=len)
        made = []
        for before in (0, 1) if names else ():
            for name in names:
                setattr(module, name, torch.full_like(module._buffers[name], before, device=device))
            makers[maker]._init_weights(module)
            made.append([module._buffers[name].clone() for name in names])
        for name, *values in zip(names, *made, strict=True):
            if not torch.equal(*values):
                raise ValueError(f"{type(model).__name__} is not supported: nothing says what {path}.{name} holds")
