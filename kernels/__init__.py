"""Ops: one eager definition each, and the choice of implementation, made once."""

from .ops import Ops, select_ops

__all__ = ["Ops", "select_ops"]
