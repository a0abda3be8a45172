"""Ops in C++ for the CPU, one .cpp each, compiled on first use (`build.py`)."""

from .build import Unavailable
from .linear import CpuLinear
from .ops import CpuOps
from .tape import Pool, Tape, lent, recording

__all__ = ["CpuLinear", "CpuOps", "Pool", "Tape", "Unavailable", "lent", "recording"]
