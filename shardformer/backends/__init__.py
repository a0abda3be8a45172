"""Attention backends: one small interface, chosen once when `PagedAttention` is built."""

from .base import AttentionBackend, AttentionMetadata, AttentionSpec, Sequences
from .eager import EagerBackend
from .registry import BACKENDS, create_backend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionSpec",
    "EagerBackend",
    "Sequences",
    "TritonBackend",
    "create_backend",
]
