"""Ops in C++ for the CPU, one .cpp each, compiled on first use (`build.py`)."""

from .build import Unavailable
from .ops import CpuOps
from .tape import Pool, Tape, lent, recording

__all__ = ["CpuOps", "Pool", "Tape", "Unavailable", "lent", "recording"]
