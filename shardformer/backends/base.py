"""What attention backends have in common: what they are asked, and how they answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...kernels.batch import PagedBatch
from ...kernels.eager import AttentionFeatures

if TYPE_CHECKING:
    from .tuning import Tuning


@dataclass(frozen=True)
class AttentionMetadata:
    """What every layer must know of a step's tokens; built once a step and passed down the forward."""

    positions: Tensor  # [num_tokens] int64: each token's place in its sequence
    slots: Tensor  # [num_tokens] int64: where its key and value go, block * block_size + offset
    plans: Mapping[str, Any]  # a backend's `plan_key` -> what its `prepare` made of the step
    wanted: Tensor | None = None  # int64 [num_wanted]: tokens whose hidden states the last stage is to give; None: all


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer asks of a backend."""

    num_heads: int  # on this rank
    num_kv_heads: int  # on this rank
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device
    window: int | None = None  # keys that a query sees, its own the last; None: all before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    has_sinks: bool = False  # `forward` is given a logit for each head that joins its softmax
    alibi_slopes: tuple[float, ...] | None = None  # one for each head on this rank
    block_size: int | None = None  # of the cache; None: what the backend prefers
    value_dim: int | None = None  # of a value head; None: head_dim
    values_in_keys: bool = False  # a value is the last elements of its key, which alone is cached

    @property
    def value_size(self) -> int:
        """Elements of a value head."""
        return self.value_dim or self.head_dim

    @property
    def token_size(self) -> int:
        """Elements that the cache holds of a token."""
        return self.num_kv_heads * (self.head_dim + (0 if self.values_in_keys else self.value_size))

    def caches(
        self, num_blocks: int, block_size: int, make: Callable[[tuple[int, ...]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """A layer's keys and values: [num_blocks, block_size, num_kv_heads, head_dim], and the same with the size of a
        value, in memory that `make` gives for a shape."""
        shape = num_blocks, block_size, self.num_kv_heads
        keys = make((*shape, self.head_dim))
        return keys, keys[..., -self.value_size :] if self.values_in_keys else make((*shape, self.value_size))

    @property
    def features(self) -> list[str]:
        """What it asks for beyond causal attention, by name."""
        asked = {
            "window": self.window is not None,
            "softcap": self.softcap is not None,
            "sinks": self.has_sinks,
            "ALiBi": self.alibi_slopes is not None,
        }
        return [name for name, is_asked in asked.items() if is_asked]


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step, as a backend's `prepare` sees them; one entry each."""

    query_lens: Sequence[int]  # new tokens
    key_lens: Sequence[int]  # keys to attend to, the new tokens' own included
    block_tables: Sequence[Sequence[int]]
    block_size: int
    batch: PagedBatch  # the same on the device, for all backends that want it so

    @classmethod
    def of(
        cls,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> "Sequences":
        batch = PagedBatch.of(query_lens, key_lens, block_tables, block_size, device)
        return cls(query_lens, key_lens, block_tables, block_size, batch)


class AttentionBackend(ABC):
    """Attention over the paged cache for one layer."""

    name: ClassVar[str]
    preferred_block_size: int = 16  # tokens; may depend on the layer
    tuning: "Tuning | None" = None  # what timing has found, where that is how it was chosen
    supports_graphs: ClassVar[bool] = False
    """Whether `prepare` and `forward` can be recorded and replayed: of a step of one query each, they take what differs
    from step to step from the tensors of `Sequences.batch` alone, and wait for nothing."""

    supports_tapes: ClassVar[bool] = False
    """The same of a tape (`kernels/cpu/tape.py`): all that `forward` does is done by torch's ops or by those in C++."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        slopes = spec.alibi_slopes
        self._features = AttentionFeatures(
            window=spec.window,
            softcap=spec.softcap,
            alibi_slopes=None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=spec.device),
        )

    @staticmethod
    @abstractmethod
    def validate(spec: AttentionSpec) -> list[str]:
        """Every reason why this backend cannot serve such a layer here; empty if it can."""

    @staticmethod
    def is_automatic(spec: AttentionSpec) -> bool:
        """Whether "auto" and "tuned" may choose this backend where it validates, or only its name."""
        return True

    @staticmethod
    def variants(spec: AttentionSpec) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """More arguments of the constructor, each worth timing, for "decode" and for "prefill"; plain data."""
        return {}

    @property
    def label(self) -> str:
        """The name, with what it stands for here where that can differ."""
        return self.name

    @property
    def plan_key(self) -> str:
        """Layers whose backends have the same key share what `prepare` makes of a step."""
        return self.name

    def features(self, sinks: Tensor | None) -> AttentionFeatures:
        """Of this layer, for a kernel. sinks: what `forward` was given."""
        assert (sinks is not None) == self.spec.has_sinks
        return self._features if sinks is None else replace(self._features, sinks=sinks)

    @abstractmethod
    def prepare(self, sequences: Sequences) -> Any:
        """What this backend needs to know of a step, made once and given to `forward` of every layer."""

    @abstractmethod
    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        """query: [num_tokens, heads, head_dim]; caches: of the spec's `caches`, already holding the step's own keys and
        values; sinks: [heads] where the spec has them. Returns [num_tokens, heads, value size]."""
