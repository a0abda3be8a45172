"""The vocabulary in which a family of models is declared.

A `Policy` says what a family's modules are called, along which dims each is sharded and where its sizes stand in
the transformers config. With a config it gives a `ModelSpec`: plain numbers that every rank builds its stage from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Dim(StrEnum):
    """What a dim of a weight counts. All but HIDDEN are split over the tp axis."""

    HIDDEN = "hidden"
    QUERY = "query"  # query heads * head size
    KEY_VALUE = "key_value"  # KV heads * head size
    INTERMEDIATE = "intermediate"
    VOCABULARY = "vocabulary"
    EXPERTS = "experts"  # whole ones


@dataclass(frozen=True)
class Module:
    """A module of the checkpoint: a linear layer (output × input), an embedding, or a norm (one dim)."""

    name: str  # in a decoder layer relative to it, otherwise from the root
    dims: tuple[Dim, ...]  # of its weight
    bias: bool = False

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, tuple[Dim, ...]]]:
        """The checkpoint's tensors of this module: (name, dims)."""
        yield f"{prefix}{self.name}.weight", self.dims
        if self.bias:
            yield f"{prefix}{self.name}.bias", self.dims[:1]


@dataclass(frozen=True)
class LayerModules:
    """One decoder layer: attention then MLP, each behind a norm and added to the residual stream."""

    input_norm: Module
    query: Module
    key: Module
    value: Module
    output: Module
    mlp_norm: Module
    gate: Module
    up: Module
    down: Module

    def tensors(self, prefix: str) -> Iterator[tuple[str, tuple[Dim, ...]]]:
        for module in vars(self).values():
            yield from module.tensors(prefix)


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding: the angle of pair i at position p is ``p * inv_freq[i]``."""

    inv_freq: tuple[float, ...]
    scaling: float  # multiplies cos and sin
    max_positions: int | None  # beyond this length the frequencies would depend on the length; None: never


@dataclass(frozen=True)
class ModelSpec:
    """Everything that a rank must know of a model to build its stage; plain data, sent to every rank."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    activation: str
    rotary: RotarySpec
    tied_embeddings: bool
    dtype: str  # of the checkpoint
    embedding: Module
    layers: str  # prefix of the decoder layers
    layer: LayerModules
    final_norm: Module
    lm_head: Module
    ignored: tuple[str, ...]  # patterns of checkpoint tensors that are knowingly not used

    def size(self, dim: Dim) -> int:
        """The unsharded size of a dim, in elements."""
        return {
            Dim.HIDDEN: self.hidden_size,
            Dim.QUERY: self.num_heads * self.head_dim,
            Dim.KEY_VALUE: self.num_kv_heads * self.head_dim,
            Dim.INTERMEDIATE: self.intermediate_size,
            Dim.VOCABULARY: self.vocab_size,
        }[dim]

    def layer_prefix(self, index: int) -> str:
        return f"{self.layers}.{index}."

    def tensors(self) -> Iterator[tuple[str, tuple[Dim, ...]]]:
        """Every tensor that a checkpoint of this model must hold: (name, dims)."""
        yield from self.embedding.tensors()
        for index in range(self.num_layers):
            yield from self.layer.tensors(self.layer_prefix(index))
        yield from self.final_norm.tensors()
        if not self.tied_embeddings:
            yield from self.lm_head.tensors()


@dataclass(frozen=True)
class Policy:
    """A family. The defaults are Llama's; a family states what differs."""

    architectures: tuple[str, ...]
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    input_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    qkv_bias: str | bool = "attention_bias"  # a config field, or the family's fixed answer
    output_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = "mlp_bias"
    config_names: dict[str, str] = field(default_factory=dict)  # our name -> the config's, where they differ
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    def spec(self, config: Any, rotary: Callable[[Any], RotarySpec]) -> ModelSpec:
        """This family with one config's numbers. `config` is a transformers config, `rotary` reads its RoPE."""

        def read(name: str, default: Any = None) -> Any:
            value = getattr(config, self.config_names.get(name, name), None)
            return default if value is None else value

        def flag(value: str | bool) -> bool:
            return bool(getattr(config, value, False)) if isinstance(value, str) else value

        heads, hidden = read("num_attention_heads"), read("hidden_size")
        qkv_bias, mlp_bias = flag(self.qkv_bias), flag(self.mlp_bias)
        h, q, kv, ff, v = Dim.HIDDEN, Dim.QUERY, Dim.KEY_VALUE, Dim.INTERMEDIATE, Dim.VOCABULARY
        return ModelSpec(
            architecture=self.architectures[0],
            num_layers=read("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=read("num_key_value_heads", heads),
            head_dim=read("head_dim", hidden // heads),
            hidden_size=hidden,
            intermediate_size=read("intermediate_size"),
            vocab_size=read("vocab_size"),
            max_position_embeddings=read("max_position_embeddings"),
            norm_eps=read("rms_norm_eps"),
            activation=read("hidden_act"),
            rotary=rotary(config),
            tied_embeddings=bool(read("tie_word_embeddings", False)),
            dtype=str(read("dtype", "float32")).removeprefix("torch."),
            embedding=Module(self.embedding, (v, h)),
            layers=self.layers,
            layer=LayerModules(
                input_norm=Module(self.input_norm, (h,)),
                query=Module(self.query, (q, h), qkv_bias),
                key=Module(self.key, (kv, h), qkv_bias),
                value=Module(self.value, (kv, h), qkv_bias),
                output=Module(self.output, (h, q), flag(self.output_bias)),
                mlp_norm=Module(self.mlp_norm, (h,)),
                gate=Module(self.gate, (ff, h), mlp_bias),
                up=Module(self.up, (ff, h), mlp_bias),
                down=Module(self.down, (h, ff), mlp_bias),
            ),
            final_norm=Module(self.final_norm, (h,)),
            lm_head=Module(self.lm_head, (v, h)),
            ignored=self.ignored + ((rf"{self.lm_head}\.weight",) if read("tie_word_embeddings", False) else ()),
        )
