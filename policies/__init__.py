"""Declarations of model families: names, sharding dims, sizes."""

from .base import Dim, LayerModules, ModelSpec, Module, Policy, RotarySpec
from .experts import MoESpec, RouterSpec, SharedExpertSpec, check_experts
from .registry import find_policy, supported_architectures

__all__ = [
    "Dim",
    "LayerModules",
    "MoESpec",
    "ModelSpec",
    "Module",
    "Policy",
    "RotarySpec",
    "RouterSpec",
    "SharedExpertSpec",
    "check_experts",
    "find_policy",
    "supported_architectures",
]
