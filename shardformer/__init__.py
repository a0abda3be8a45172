"""Sharding a model over a mesh: splits, parallel layers, paged attention, weight loading."""

from .shardformer import Checkpoint, InferenceShardformer, Model, open_checkpoint
from .weights import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "InferenceShardformer", "Model", "open_checkpoint"]
