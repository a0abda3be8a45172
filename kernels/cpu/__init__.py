"""Ops in C++ for the CPU, one .cpp each, compiled on first use (`build.py`)."""

from .build import Unavailable
from .ops import CpuOps

__all__ = ["CpuOps", "Unavailable"]
