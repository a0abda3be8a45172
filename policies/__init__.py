"""Declarations of model families: names, sharding dims, sizes."""

from .base import Dim, LayerModules, ModelSpec, Module, Policy, RotarySpec
from .registry import find_policy, supported_architectures

__all__ = [
    "Dim",
    "LayerModules",
    "ModelSpec",
    "Module",
    "Policy",
    "RotarySpec",
    "find_policy",
    "supported_architectures",
]
