"""The vocabulary in which a model is declared: plain data that every rank builds its stage from.

Modules are called what transformers calls them in memory. `policy.py` reads this from a config, family by family.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol


class Dim(StrEnum):
    """What a dim of a weight counts. All but HIDDEN are split over the tp axis."""

    HIDDEN = "hidden"  # or anything else that every rank holds whole
    QUERY = "query"  # query heads, any number of elements each
    KEY_VALUE = "key_value"  # KV heads, any number of elements each
    INTERMEDIATE = "intermediate"
    EXPERTS = "experts"  # split where whole experts go to ranks
    EXPERT_INTERMEDIATE = "expert_intermediate"  # split where each expert does
    VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the checkpoint, or a part of one: parts of the same name lie one after the other along a dim."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    along: int = 0
    float32: bool = False  # held so whatever the model's dtype


class Declared(Protocol):
    """Anything that owns tensors of the checkpoint."""

    def tensors(self, prefix: str) -> Iterator[TensorSpec]: ...


@dataclass(frozen=True)
class Rows:
    """Where a module's rows stand in a tensor that it shares with others: runs, from each period's first row on."""

    first: int
    run: int  # rows of the module in a period
    period: int  # rows of the tensor in a period


@dataclass(frozen=True)
class Module:
    """A module of the checkpoint: a linear layer (output × input), an embedding, a norm, or a bare parameter."""

    name: str  # in a decoder layer relative to it, otherwise from the root
    dims: tuple[Dim, ...]  # of its weight
    sizes: tuple[int, ...]  # unsharded
    bias: bool = False
    rows: Rows | None = None  # in a tensor that is shared with others; None: all of them, or the next after the others'
    transposed: bool = False  # the checkpoint has it as input × output
    parameter: str = ".weight"  # "": the module is the parameter itself
    has_weight: bool = True  # a norm may do without

    def tensors(self, prefix: str) -> Iterator[TensorSpec]:
        flip = -1 if self.transposed else 1
        along = 1 if self.transposed else 0
        if self.has_weight:
            yield TensorSpec(prefix + self.name + self.parameter, self.sizes[::flip], self.dims[::flip], along)
        if self.bias:
            yield TensorSpec(f"{prefix}{self.name}.bias", self.sizes[:1], self.dims[:1])

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Rows of the checkpoint's tensor that are the module's rows `start` to `stop`, in order."""
        if self.rows is None:
            yield start, stop
            return
        first, run, period = self.rows.first, self.rows.run, self.rows.period
        while start < stop:
            count = min(stop, (start // run + 1) * run) - start
            row = first + start // run * period + start % run
            yield row, row + count
            start += count


@dataclass(frozen=True)
class RotarySpec:
    """Rotary embedding: the angle of pair i at position p is ``p * inv_freq[i]``."""

    inv_freq: tuple[float, ...]
    scaling: float  # multiplies cos and sin
    max_positions: int | None  # beyond this length the frequencies would depend on the length; None: never


@dataclass(frozen=True)
class AttentionKind:
    """What a layer computes between its projections, whatever they are."""

    head_dim: int
    scale: float
    value_dim: int | None = None  # None: head_dim
    window: int | None = None  # keys that a query sees, its own the last; None: all before it
    softcap: float | None = None
    has_sinks: bool = False
    alibi_slopes: tuple[float, ...] | None = None  # of all heads
    is_latent: bool = False  # one KV head, which every rank keeps, its last value_dim elements being the values
    is_replicated: bool = False  # every rank has all heads


class QKNorm(StrEnum):
    """What is normalised of query and key before they are rotated."""

    HEAD = "head"  # each head, RMS
    FULL = "full"  # all heads together, RMS
    HEAD_LAYER = "head_layer"  # each head about its mean, with a weight of its own


@dataclass(frozen=True)
class MultiHeadSpec:
    """Multi-head attention with keys and values of its own."""

    kind: AttentionKind
    query: Module
    key: Module
    value: Module
    output: Module
    rotary: int | None  # which of the model's; None: no rotation
    interleaved: bool  # which elements rotate together
    qk_norm: QKNorm | None = None
    query_norm: Module | None = None
    key_norm: Module | None = None
    sinks: Module | None = None

    def tensors(self, prefix: str) -> Iterator[TensorSpec]:
        for module in (self.query, self.key, self.value, self.output, self.query_norm, self.key_norm, self.sinks):
            if module is not None:
                yield from module.tensors(prefix)


@dataclass(frozen=True)
class MLPSpec:
    """``down(activation(gate) * up)``, or ``down(activation(up))`` where there is no gate."""

    gate: Module | None
    up: Module
    down: Module
    activation: str  # as transformers calls it

    def tensors(self, prefix: str) -> Iterator[TensorSpec]:
        for module in (self.gate, self.up, self.down):
            if module is not None:
                yield from module.tensors(prefix)


class Residual(StrEnum):
    """How attention and MLP join the residual stream x."""

    SEQUENTIAL = "sequential"  # x += attention(norm(x)), then x += mlp(norm(x))
    PARALLEL = "parallel"  # x += attention(norm(x)) + mlp(norm(x))
    POST_NORM = "post_norm"  # x = norm(x + attention(x)), then x = norm(x + mlp(x))


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer."""

    attention: Declared
    mlp: Declared
    input_norm: Module | None
    attention_post_norm: Module | None  # of what attention gives
    mlp_norm: Module | None  # with Residual.PARALLEL, None: what the input norm gives
    mlp_post_norm: Module | None
    residual: Residual
    residual_multiplier: float

    def tensors(self, prefix: str) -> Iterator[TensorSpec]:
        for part in (
            self.input_norm,
            self.attention,
            self.attention_post_norm,
            self.mlp_norm,
            self.mlp,
            self.mlp_post_norm,
        ):
            if part is not None:
                yield from part.tensors(prefix)


@dataclass(frozen=True)
class NormSpec:
    """All norms of a model."""

    is_rms: bool  # else about the mean
    eps: float
    offset: float = 0.0  # added to the weight


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token ids to hidden states: look-up, projection, multiplier, learned positions, norm; whatever of it there is."""

    tokens: Module
    multiplier: float = 1.0
    projection: Module | None = None
    positions: Module | None = None
    first_position: int = 0  # row of position 0
    norm: Module | None = None

    def tensors(self, prefix: str = "") -> Iterator[TensorSpec]:
        for module in (self.tokens, self.projection, self.positions, self.norm):
            if module is not None:
                yield from module.tensors(prefix)


@dataclass(frozen=True)
class HeadSpec:
    """Hidden states to logits: norm, projection, product with the vocabulary, times `multiplier`, softcap."""

    linear: Module
    norm: Module | None = None
    projection: Module | None = None
    multiplier: float = 1.0
    softcap: float | None = None

    def tensors(self, prefix: str = "") -> Iterator[TensorSpec]:
        for module in (self.norm, self.projection, self.linear):
            if module is not None:
                yield from module.tensors(prefix)


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ABC):
    """What the engine must know of a model, however its layers are made; plain data, sent to every rank."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int  # the longest sequence
    tied_embeddings: bool
    dtype: str  # of the checkpoint
    ignored: tuple[str, ...] = ()  # patterns of checkpoint tensors that are knowingly not used
    why_one_stage: str | None = None  # what keeps it from being divided into stages
    why_undivided: str | None = None  # what keeps its layers from being divided over tp

    @property
    @abstractmethod
    def policy(self) -> str:
        """Which kind of policy this is from."""

    @property
    @abstractmethod
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Of each layer."""

    @abstractmethod
    def embedding_tensors(self) -> Iterator[TensorSpec]:
        """What the first stage holds beside its layers."""

    @abstractmethod
    def layer_tensors(self, index: int) -> Iterator[TensorSpec]:
        """What a decoder layer is made of."""

    @abstractmethod
    def head_tensors(self) -> Iterator[TensorSpec]:
        """What the last stage holds beside its layers; the embedding's weight again where it is tied."""

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor that a checkpoint of this model must hold, in parts where several modules share it."""
        first = list(self.embedding_tensors())
        yield from first
        for index in range(self.num_layers):
            yield from self.layer_tensors(index)
        names = {tensor.name for tensor in first}
        yield from (tensor for tensor in self.head_tensors() if tensor.name not in names)

    def plain(self) -> dict[str, Any]:
        """All that it says, in dicts, tuples and plain values."""
        return asdict(self)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of `tensors`, each once: name -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for tensor in self.tensors():
            shape, along = list(tensor.shape), tensor.along
            if tensor.name in shapes:
                shape[along] += shapes[tensor.name][along]
            shapes[tensor.name] = tuple(shape)
        return shapes


@dataclass(frozen=True, kw_only=True)
class DecoderSpec(ModelSpec):
    """A model whose layers are ours."""

    prefix: str  # of the decoder layers
    embedding: EmbeddingSpec
    layers: tuple[LayerSpec, ...]
    head: HeadSpec
    norm: NormSpec
    rotaries: tuple[RotarySpec, ...]

    @property
    def policy(self) -> str:
        return "hand-written"

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        return tuple(layer.attention.kind for layer in self.layers)  # type: ignore[attr-defined]

    def layer_prefix(self, index: int) -> str:
        return f"{self.prefix}.{index}."

    def embedding_tensors(self) -> Iterator[TensorSpec]:
        yield from self.embedding.tensors()

    def layer_tensors(self, index: int) -> Iterator[TensorSpec]:
        yield from self.layers[index].tensors(self.layer_prefix(index))

    def head_tensors(self) -> Iterator[TensorSpec]:
        yield from self.head.tensors()
