"""Attention backends: one small interface, chosen once when `PagedAttention` is built."""

from .base import AttentionBackend, AttentionMetadata, AttentionSpec, Sequences
from .bound import Bound, describe_bound
from .cpu import CpuBackend
from .eager import EagerBackend
from .flash import FlashBackend
from .registry import BACKENDS, CHOICES, auto_backend, create_backend, why_not
from .triton import TritonBackend
from .tuning import Tuning, Workload, tune

__all__ = [
    "BACKENDS",
    "CHOICES",
    "AttentionBackend",
    "AttentionMetadata",
    "AttentionSpec",
    "Bound",
    "CpuBackend",
    "EagerBackend",
    "FlashBackend",
    "Sequences",
    "TritonBackend",
    "Tuning",
    "Workload",
    "auto_backend",
    "create_backend",
    "describe_bound",
    "tune",
    "why_not",
]
