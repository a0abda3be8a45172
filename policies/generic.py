"""Families without a file of their own: transformers' decoder layers, sharded as transformers' tables say.

A table (`base_model_tp_plan` of a config's class) names modules and parameters, `*` standing for a number, and gives
each a style. This is what the styles mean here. How much each rank gets is not theirs to say: `Shards` does.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .base import AttentionKind, ModelSpec, TensorSpec


@dataclass(frozen=True)
class Style:
    """What becomes of a module or a parameter of its own: of the last two dims of a weight, out and in."""

    splits_output: bool = False
    splits_input: bool = False
    parts: int = 1  # that lie one after the other along the split dim, each split by itself
    is_gathered: bool = False  # every rank gets the whole output
    takes_whole: bool = False  # every rank has the whole input, and takes its part of it
    is_summed: bool = False  # a module whose output is a part of a sum over ranks

    @property
    def is_split(self) -> bool:
        return self.splits_output or self.splits_input


STYLES: Mapping[str, Style] = {
    "colwise": Style(splits_output=True),
    "colwise_gather_output": Style(splits_output=True, is_gathered=True),
    "colwise_rep": Style(splits_output=True, is_gathered=True),
    "packed_colwise": Style(splits_output=True, parts=2),
    "rowwise": Style(splits_input=True),
    "rowwise_split_input": Style(splits_input=True, takes_whole=True),
    "rowwise_rep": Style(splits_input=True, takes_whole=True),
    "packed_rowwise": Style(splits_input=True, parts=2),
    "moe_tp_experts": Style(is_summed=True),
    "all_reduce": Style(is_summed=True),
    # What these ask for is of gradients, or of how parameters are wrapped: every rank has the whole.
    "replicated_with_grad_allreduce": Style(),
    "mla_kv_a_proj": Style(),
    "local_params": Style(),
    "replicate": Style(),
}


def _table(column: str, row: str, gathered: bool = False) -> dict[str, str]:
    """A table for the modules of a decoder layer."""
    columns, rows = ("colwise_gather_output", "rowwise_split_input") if gathered else ("colwise", "rowwise")
    return {f"layers.*.{name}": columns for name in column.split()} | {f"layers.*.{name}": rows for name in row.split()}


_QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
_MLP = "mlp.gate_proj mlp.up_proj"
_LLAMA = _table(f"{_QKV} {_MLP}", "self_attn.o_proj mlp.down_proj")
_BERT = {
    "layer.*.attention.self.query": "colwise",
    "layer.*.attention.self.key": "colwise",
    "layer.*.attention.self.value": "colwise",
    "layer.*.attention.output.dense": "rowwise",
    "layer.*.intermediate.dense": "colwise",
    "layer.*.output.dense": "rowwise",
}
MISSING_PLANS: Mapping[str, Mapping[str, str]] = {
    "bert": _BERT,
    "bert-generation": _BERT,
    "biogpt": _table(f"{_QKV} fc1", "self_attn.out_proj fc2"),
    # It normalises over all heads, and over the whole intermediate dim.
    "bitnet": _table(f"{_QKV} {_MLP}", "self_attn.o_proj mlp.down_proj", gathered=True),
    "camembert": _BERT,
    "ctrl": {
        "h.*.multi_head_attention.Wq": "colwise",
        "h.*.multi_head_attention.Wk": "colwise",
        "h.*.multi_head_attention.Wv": "colwise",
        "h.*.multi_head_attention.dense": "rowwise",
        "h.*.ffn.*": "replicate",
    },
    "data2vec-text": _BERT,
    "electra": _BERT,
    "emu3_text_model": _LLAMA,
    "ernie": _BERT,
    "gpt_bigcode": {"h.*.mlp.c_fc": "colwise", "h.*.mlp.c_proj": "rowwise"},
    "hunyuan_v1_dense": _LLAMA,
    "modernbert-decoder": {
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise",
        "layers.*.attn.v_proj": "colwise",
        "layers.*.attn.Wo": "rowwise",
        "layers.*.mlp.Wi": "packed_colwise",
        "layers.*.mlp.Wo": "rowwise",
    },
    "persimmon": _table("self_attn.query_key_value mlp.dense_h_to_4h", "self_attn.dense mlp.dense_4h_to_h"),
    "roberta": _BERT,
    "roberta-prelayernorm": _BERT,
    "roc_bert": _BERT,
    "stablelm": _LLAMA,
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": _BERT,
}
"""Tables for families to which transformers gives none, by the config's `model_type`."""


def find_plan(config: Any) -> dict[str, str] | None:
    """The table of a transformers config; None where there is none."""
    plan = getattr(config, "base_model_tp_plan", None) or MISSING_PLANS.get(config.model_type)
    return None if plan is None else dict(plan)


def style_of(name: str, plan: Mapping[str, str], prefix: str) -> str | None:
    """What a plan says of the module or parameter `name`; its own names come without `prefix`."""
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(prefix)))


@dataclass(frozen=True, kw_only=True)
class GenericSpec(ModelSpec):
    """A model whose layers are transformers'."""

    config: Any  # transformers'
    model_class: Any  # transformers', or one that the checkpoint brings
    prefix: str  # of the decoder layers
    attention: str  # what a layer calls the module that attends
    embedding: str  # names of modules
    lm_head: str
    tied: Mapping[str, str]  # tensors of the LM head that are others' under another name: its own -> the other's
    embedding_size: int  # of a row, which a projection may follow
    after_layers: tuple[str, ...]  # modules that the last stage alone runs
    hands_on: bool  # layers give their attention the keyword arguments that they get
    layer_outputs: int | None  # of a layer, in a tuple; None: hidden states alone
    styles: Mapping[str, str]  # of modules and parameters, by name; those that every rank holds whole are not there
    kinds: tuple[AttentionKind, ...]
    first: tuple[TensorSpec, ...]  # see `embedding_tensors`
    layers: tuple[tuple[TensorSpec, ...], ...]
    last: tuple[TensorSpec, ...]

    def plain(self) -> dict[str, Any]:
        return asdict(replace(self, config=None)) | {"config": self.config.to_dict()}

    @property
    def policy(self) -> str:
        return "generic"

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        return self.kinds

    def embedding_tensors(self) -> Iterator[TensorSpec]:
        yield from self.first

    def layer_tensors(self, index: int) -> Iterator[TensorSpec]:
        yield from self.layers[index]

    def head_tensors(self) -> Iterator[TensorSpec]:
        yield from self.last
