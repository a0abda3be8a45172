"""Ops in C++ for the CPU, one .cpp each, compiled on first use (`build.py`)."""

from .build import Unavailable
from .linear import CpuLinear
from .ops import CpuOps
from .tape import Pool, Tape, lent, recording
from .varying import Extent, VaryingTape

__all__ = ["CpuLinear", "CpuOps", "Extent", "Pool", "Tape", "Unavailable", "VaryingTape", "lent", "recording"]
