"""Attention backends: one small interface, chosen once when `PagedAttention` is built."""

from .base import AttentionBackend, AttentionMetadata, AttentionSpec, Sequences
from .bound import Bound, describe_bound
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
    "Bound",
    "CpuBackend",
    "EagerBackend",
    "FlashBackend",
    "Sequences",
    "TritonBackend",
    "auto_backend",
    "create_backend",
    "describe_bound",
    "why_not",
]
