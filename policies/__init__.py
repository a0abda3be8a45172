"""Declarations of model families: names, sharding dims, sizes."""

from .base import (
    AttentionKind,
    DecoderSpec,
    Dim,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    Module,
    MultiHeadSpec,
    NormSpec,
    QKNorm,
    Residual,
    RotarySpec,
    TensorSpec,
)
from .experts import MoESpec, RouterSpec, SharedExpertSpec
from .generic import GenericSpec
from .latent import LatentSpec
from .policy import Policy
from .registry import find_policy, has_policy, nearest_supported, supported_architectures

__all__ = [
    "AttentionKind",
    "DecoderSpec",
    "Dim",
    "EmbeddingSpec",
    "GenericSpec",
    "HeadSpec",
    "LatentSpec",
    "LayerSpec",
    "MLPSpec",
    "MoESpec",
    "ModelSpec",
    "Module",
    "MultiHeadSpec",
    "NormSpec",
    "Policy",
    "QKNorm",
    "Residual",
    "RotarySpec",
    "RouterSpec",
    "SharedExpertSpec",
    "TensorSpec",
    "find_policy",
    "has_policy",
    "nearest_supported",
    "supported_architectures",
]
