"""Sharding a model over a mesh: splits, parallel layers, paged attention, weight loading."""

from .shardformer import Checkpoint, InferenceShardformer, open_checkpoint
from .weights import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "InferenceShardformer", "open_checkpoint"]
