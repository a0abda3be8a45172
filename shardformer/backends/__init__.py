"""Attention backends: one small interface, chosen once when `PagedAttention` is built."""

from .base import AttentionBackend, AttentionMetadata, AttentionSpec, Sequences
from .cpu import CpuBackend
from .eager import EagerBackend
from .flash import FlashBackend
from .registry import BACKENDS, auto_backend, create_backend, why_not
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionSpec",
    "CpuBackend",
    "EagerBackend",
    "FlashBackend",
    "Sequences",
    "TritonBackend",
    "auto_backend",
    "create_backend",
    "why_not",
]
