"""Attention backends: one small interface, chosen once when `PagedAttention` is built.

Adding one: a class with `validate`, `prepare` and `forward`, and its name in `BACKENDS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import eager


@dataclass(frozen=True)
class AttentionMetadata:
    """What every layer must know of a step's tokens; built once a step and passed down the forward."""

    positions: Tensor  # [num_tokens] int64: each token's place in its sequence
    slots: Tensor  # [num_tokens] int64: where its key and value go, block * block_size + offset
    plans: Mapping[str, Any]  # backend name -> what its `prepare` made of the step


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer asks of a backend."""

    num_heads: int  # on this rank
    num_kv_heads: int  # on this rank
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step, as a backend's `prepare` sees them; one entry each."""

    query_lens: Sequence[int]  # new tokens
    key_lens: Sequence[int]  # keys to attend to, the new tokens' own included
    block_tables: Sequence[Sequence[int]]
    block_size: int


class AttentionBackend(ABC):
    """Attention over the paged cache for one layer."""

    name: ClassVar[str]
    preferred_block_size: ClassVar[int] = 16

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @staticmethod
    @abstractmethod
    def validate(spec: AttentionSpec) -> list[str]:
        """Every reason why this backend cannot serve such a layer here; empty if it can."""

    @abstractmethod
    def prepare(self, sequences: Sequences) -> Any:
        """What this backend needs to know of a step, made once and given to `forward` of every layer."""

    @abstractmethod
    def forward(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any) -> Tensor:
        """query: [num_tokens, heads, head_dim]; caches: [num_blocks, block_size, kv_heads, head_dim], already holding
        the step's own keys and values. Returns query's shape."""


class EagerBackend(AttentionBackend):
    """Plain torch, on any device and dtype: gathers the blocks, then torch's scaled_dot_product_attention."""

    name = "eager"

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        return []

    def prepare(self, sequences: Sequences) -> eager.AttentionPlan:
        return eager.plan_attention(
            sequences.query_lens,
            sequences.key_lens,
            sequences.block_tables,
            sequences.block_size,
            self.spec.dtype,
            self.spec.device,
        )

    def forward(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any) -> Tensor:
        return eager.paged_attention(query, key_cache, value_cache, plan, self.spec.scale)


BACKENDS: dict[str, type[AttentionBackend]] = {"eager": EagerBackend}  # the fastest first: `auto` takes the first fit


def create_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend of that name, or with "auto" the first that validates. Raises ValueError with every reason."""
    if name == "auto":
        name = next(name for name, backend in BACKENDS.items() if not backend.validate(spec))
    if name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    reasons = BACKENDS[name].validate(spec)
    if reasons:
        raise ValueError(f"attention_backend={name!r} cannot serve here: {'; '.join(reasons)}")
    return BACKENDS[name](spec)
