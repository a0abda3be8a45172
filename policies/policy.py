"""A family of models, and how its config is read.

A `Policy` says what a family's modules are called, along which dims each is sharded, how a layer is put together and
where its numbers stand in the transformers config. With a config it gives a `DecoderSpec`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar

from .base import (
    AttentionKind,
    Declared,
    DecoderSpec,
    Dim,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    Module,
    MultiHeadSpec,
    NormSpec,
    QKNorm,
    Residual,
    RotarySpec,
    Rows,
)

T = TypeVar("T")
Of: TypeAlias = T | Callable[[Any], T]
"""A family's fixed answer, or how to read it from a config."""


# ---- reading a config ------------------------------------------------------------------------------------------------


def read(config: Any, name: str, default: Any = None) -> Any:
    """A config's field; where it has none, or None, the default."""
    value = getattr(config, name, None)
    return default if value is None else value


def resolve(value: Of[T], config: Any) -> T:
    return value(config) if callable(value) else value


def layer_type(config: Any, layer: int) -> str | None:
    """What transformers calls the kind of a layer's attention, where kinds differ."""
    types = read(config, "layer_types")
    return None if types is None else types[layer]


def layer_window(config: Any, layer: int) -> int | None:
    """The window of a layer's attention: of those that `layer_types` calls sliding, or of all where it says nothing."""
    kind = layer_type(config, layer)
    return None if kind == "full_attention" else read(config, "sliding_window")


def always(config: Any, layer: int) -> bool:
    return True


_UNLIMITED = 1 << 20  # tokens, where nothing in the model limits them


# ---- a family --------------------------------------------------------------------------------------------------------


class Layout(StrEnum):
    """How query, key and value stand in one tensor."""

    PACKED = "packed"  # all queries, all keys, all values
    GROUPED = "grouped"  # KV head by KV head: its queries, its key, its value


@dataclass(frozen=True)
class Fused:
    name: str
    layout: Layout = Layout.PACKED


@dataclass(frozen=True)
class Policy:
    """A family. The defaults are Llama's; a family states what differs.

    A field of type `Of` is a fixed answer or a function of the config; those of a layer take its number as well.
    """

    architectures: tuple[str, ...]
    config_names: Mapping[str, str] = field(default_factory=dict)  # our name -> the config's, where they differ
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    refusal: Callable[[Any], str | None] = lambda config: None  # what of a config this policy does not serve

    # names of modules
    embedding: str = "model.embed_tokens"
    embedding_norm: str | None = None
    embedding_projection: Of[str | None] = None
    embedding_size: Of[int | None] = None  # of a row, where it is not the hidden size
    positions: str | None = None  # learned
    first_position: int = 0  # row of position 0
    layers: str = "model.layers"
    final_norm: Of[str | None] = "model.norm"
    head_projection: Of[str | None] = None
    lm_head: str = "lm_head"
    input_norm: Of[str | None] = "input_layernorm"
    attention_post_norm: Of[str | None] = None
    mlp_norm: Of[str | None] = "post_attention_layernorm"
    mlp_post_norm: Of[str | None] = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: Of[Fused | None] = None  # instead of the three
    output: str = "self_attn.o_proj"
    sinks: str | None = None
    gate: str | None = "mlp.gate_proj"  # None: the MLP has none
    up: str = "mlp.up_proj"
    gate_up: str | None = None  # instead of the two
    down: str = "mlp.down_proj"

    # what they are
    transposed: bool = False  # weights of linear layers are stored as input × output
    qkv_bias: Of[bool] = lambda config: bool(read(config, "attention_bias", False))
    output_bias: Of[bool] = lambda config: bool(read(config, "attention_bias", False))
    mlp_bias: Of[bool] = lambda config: bool(read(config, "mlp_bias", False))
    head_bias: bool = False
    is_rms: bool = True
    norm_eps: Of[float] = lambda config: float(config.rms_norm_eps)
    norm_offset: float = 0.0
    norm_bias: Of[bool] = False
    norm_weight: Of[bool] = True
    residual: Of[Residual] = Residual.SEQUENTIAL
    activation: Of[str] = lambda config: config.hidden_act
    tied: Of[bool] = lambda config: bool(read(config, "tie_word_embeddings", False))

    # attention
    num_kv_heads: Of[int | None] = lambda config: read(config, "num_key_value_heads")  # None: as many as query heads
    scale: Callable[[Any, int], float | None] = lambda config, layer: None  # None: head_dim ** -0.5
    softcap: Of[float | None] = None
    has_windows: bool = False  # whether sliding_window is heard
    rotates: Callable[[Any, int], bool] = always
    interleaved: bool = False
    rotates_in_part: bool = False  # whether partial_rotary_factor is heard
    alibi: Callable[[Any], tuple[float, ...] | None] = lambda config: None
    qk_norm: Of[QKNorm | None] = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"

    # numbers
    embedding_multiplier: Of[float] = 1.0
    residual_multiplier: Of[float] = 1.0
    logits_multiplier: Of[float] = 1.0
    logits_softcap: Of[float | None] = None

    # another kind of attention or MLP than the above declares: (config, layer) -> it, or None for the usual; attention
    # is also given what tells which of the model's rotary embeddings a layer has
    attention_of: Callable[[Any, int, Callable[[int], int]], Declared | None] = lambda config, layer, rotary: None
    mlp_of: Callable[[Any, int], Declared | None] = lambda config, layer: None

    def spec(self, config: Any, rotary: Callable[[Any, str | None], RotarySpec]) -> DecoderSpec:
        """This family with one config's numbers. `config` is a transformers config; `rotary` reads from it the RoPE of
        a type of layer. Raises ValueError where the config asks for what the policy does not serve."""
        return _Reader(self, config, rotary).spec()


class _Reader:
    """A policy with a config."""

    def __init__(self, policy: Policy, config: Any, rotary: Callable[[Any, str | None], RotarySpec]) -> None:
        self.policy, self.config = policy, config
        self.hidden = self.number("hidden_size")
        self.num_layers = self.number("num_hidden_layers")
        self.heads = self.number("num_attention_heads")
        self.kv_heads = self.the(policy.num_kv_heads) or self.heads
        self.head_dim = self.number("head_dim", self.hidden // self.heads)
        self.rotary_indices: dict[str | None, int] = {}  # type of layer -> which
        self.rotaries: list[RotarySpec] = []
        self._rotary = rotary

    def number(self, name: str, default: Any = None) -> Any:
        return read(self.config, self.policy.config_names.get(name, name), default)

    def the(self, value: Of[T]) -> T:
        return resolve(value, self.config)

    def norm(self, name: Of[str | None]) -> Module | None:
        name = self.the(name)
        if name is None:
            return None
        bias, weight = self.the(self.policy.norm_bias), self.the(self.policy.norm_weight)
        return Module(name, (Dim.HIDDEN,), (self.hidden,), bias, has_weight=weight)

    def linear(self, name: str, dims: tuple[Dim, Dim], sizes: tuple[int, int], bias: bool) -> Module:
        return Module(name, dims, sizes, bias, transposed=self.policy.transposed)

    def spec(self) -> DecoderSpec:
        policy, config = self.policy, self.config
        if (refusal := policy.refusal(config) or self._unheard_window()) is not None:
            raise ValueError(f"{policy.architectures[0]} with {refusal} is not supported")
        layers = self._layers()
        limits = [rotary.max_positions for rotary in self.rotaries if rotary.max_positions is not None]
        tied = self.the(policy.tied)
        embedding, head = self._ends(tied)
        return DecoderSpec(
            architecture=policy.architectures[0],
            num_layers=self.num_layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            hidden_size=self.hidden,
            vocab_size=self.number("vocab_size"),
            max_position_embeddings=min([self.number("max_position_embeddings", _UNLIMITED), *limits]),
            tied_embeddings=tied,
            dtype=str(read(config, "dtype", "float32")).removeprefix("torch."),
            ignored=policy.ignored + ((rf"{policy.lm_head}\.weight",) if tied else ()),
            prefix=policy.layers,
            embedding=embedding,
            layers=layers,
            head=head,
            norm=NormSpec(policy.is_rms, self.the(policy.norm_eps), policy.norm_offset),
            rotaries=tuple(self.rotaries),
        )

    def _unheard_window(self) -> str | None:
        """A window in the config of a family without. transformers' layers do not hear it either, but its cache does,
        and forgets what later tokens are to see."""
        longest = self.number("max_position_embeddings", _UNLIMITED)
        windows = [layer_window(self.config, index) for index in range(self.num_layers)]
        short = [window for window in windows if window is not None and window < longest]
        return f"sliding_window={short[0]}" if short and not self.policy.has_windows else None

    def _ends(self, tied: bool) -> tuple[EmbeddingSpec, HeadSpec]:
        policy, h, v = self.policy, Dim.HIDDEN, Dim.VOCABULARY
        width = self.the(policy.embedding_size) or self.hidden
        vocabulary = (v, h), (self.number("vocab_size"), width)
        tokens = Module(policy.embedding, *vocabulary)
        into, out = self.the(policy.embedding_projection), self.the(policy.head_projection)
        rows = self.number("max_position_embeddings", 0) + policy.first_position
        embedding = EmbeddingSpec(
            tokens=tokens,
            multiplier=self.the(policy.embedding_multiplier),
            projection=Module(into, (h, h), (self.hidden, width)) if into else None,
            positions=Module(policy.positions, (h, h), (rows, self.hidden)) if policy.positions else None,
            first_position=policy.first_position,
            norm=self.norm(policy.embedding_norm),
        )
        head = HeadSpec(
            linear=tokens if tied else Module(policy.lm_head, *vocabulary, bias=policy.head_bias),
            norm=self.norm(policy.final_norm),
            projection=Module(out, (h, h), (width, self.hidden)) if out else None,
            multiplier=self.the(policy.logits_multiplier),
            softcap=self.the(policy.logits_softcap),
        )
        return embedding, head

    def _layers(self) -> tuple[LayerSpec, ...]:
        """Layers that are alike are one object."""
        policy = self.policy
        known: dict[LayerSpec, LayerSpec] = {}
        layers = []
        for index in range(self.num_layers):
            layer = LayerSpec(
                attention=policy.attention_of(self.config, index, self.rotary) or self._attention(index),
                mlp=policy.mlp_of(self.config, index) or self._mlp(),
                input_norm=self.norm(policy.input_norm),
                attention_post_norm=self.norm(policy.attention_post_norm),
                mlp_norm=self.norm(policy.mlp_norm),
                mlp_post_norm=self.norm(policy.mlp_post_norm),
                residual=self.the(policy.residual),
                residual_multiplier=self.the(policy.residual_multiplier),
            )
            layers.append(known.setdefault(layer, layer))
        return tuple(layers)

    def _attention(self, index: int) -> MultiHeadSpec:
        policy, h, q, kv = self.policy, Dim.HIDDEN, Dim.QUERY, Dim.KEY_VALUE
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = self.the(policy.qkv_bias)
        fused = self.the(policy.qkv)
        names = (policy.query, policy.key, policy.value) if fused is None else (fused.name,) * 3
        parts = [
            self.linear(name, (dim, h), (size, self.hidden), bias)
            for name, dim, size in zip(names, (q, kv, kv), (width, kv_width, kv_width), strict=True)
        ]
        query, key, value = parts if fused is None else _fuse(parts, fused.layout, self.kv_heads)
        alibi = policy.alibi(self.config)
        kind = AttentionKind(
            head_dim=self.head_dim,
            scale=policy.scale(self.config, index) or self.head_dim**-0.5,
            window=layer_window(self.config, index) if policy.has_windows else None,
            softcap=self.the(policy.softcap),
            has_sinks=policy.sinks is not None,
            alibi_slopes=alibi,
        )
        qk_norm = self.the(policy.qk_norm)
        query_norm, key_norm = self._qk_norms(qk_norm)
        return MultiHeadSpec(
            kind=kind,
            query=query,
            key=key,
            value=value,
            output=self.linear(policy.output, (h, q), (self.hidden, width), self.the(policy.output_bias)),
            rotary=self.rotary(index) if alibi is None and policy.rotates(self.config, index) else None,
            interleaved=policy.interleaved,
            qk_norm=qk_norm,
            query_norm=query_norm,
            key_norm=key_norm,
            sinks=Module(policy.sinks, (q,), (self.heads,), parameter="") if policy.sinks else None,
        )

    def _qk_norms(self, kind: QKNorm | None) -> tuple[Module | None, Module | None]:
        h, q, kv, size = Dim.HIDDEN, Dim.QUERY, Dim.KEY_VALUE, self.head_dim
        names = self.policy.query_norm, self.policy.key_norm
        if kind is None:
            return None, None
        if kind is QKNorm.HEAD:
            return Module(names[0], (h,), (size,)), Module(names[1], (h,), (size,))
        if kind is QKNorm.FULL:
            return Module(names[0], (q,), (self.heads * size,)), Module(names[1], (kv,), (self.kv_heads * size,))
        return Module(names[0], (q, h), (self.heads, size)), Module(names[1], (kv, h), (self.kv_heads, size))

    def rotary(self, index: int) -> int:
        """Which of the model's rotary embeddings a layer has."""
        kind = layer_type(self.config, index)
        if kind not in self.rotary_indices:
            found = self._rotary(self.config, kind)
            width, size = 2 * len(found.inv_freq), self.head_dim
            if size % 2 or width > size or (width < size and not self.policy.rotates_in_part):
                raise ValueError(
                    f"{self.policy.architectures[0]} with a rotary embedding of {width} of each head's {size} elements "
                    f"is not supported; head_dim must be even and partial_rotary_factor 1"
                )
            if found not in self.rotaries:
                self.rotaries.append(found)
            self.rotary_indices[kind] = self.rotaries.index(found)
        return self.rotary_indices[kind]

    def _mlp(self) -> MLPSpec:
        policy, h, ff = self.policy, Dim.HIDDEN, Dim.INTERMEDIATE
        size, bias = self.number("intermediate_size", 4 * self.hidden), self.the(policy.mlp_bias)
        up = self.linear(policy.up, (ff, h), (size, self.hidden), bias)
        gate = None if policy.gate is None else replace(up, name=policy.gate)
        if policy.gate_up is not None:
            gate = replace(up, name=policy.gate_up, rows=Rows(0, size, 2 * size))
            up = replace(up, name=policy.gate_up, rows=Rows(size, size, 2 * size))
        return MLPSpec(
            gate=gate,
            up=up,
            down=self.linear(policy.down, (h, ff), (self.hidden, size), bias),
            activation=self.the(policy.activation),
        )


def _fuse(parts: Iterable[Module], layout: Layout, kv_heads: int) -> list[Module]:
    """Query, key and value as parts of one tensor."""
    parts = list(parts)
    total, groups = sum(part.sizes[0] for part in parts), kv_heads if layout is Layout.GROUPED else 1
    first, fused = 0, []
    for part in parts:
        run = part.sizes[0] // groups
        fused.append(replace(part, rows=Rows(first, run, total // groups)))
        first += run
    return fused
