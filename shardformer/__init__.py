"""Sharding a model over a mesh: splits, parallel layers, paged attention, weight loading."""

from .checkpoint import Checkpoint, Model, open_checkpoint, read_spec
from .shardformer import InferenceShardformer
from .weights import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "InferenceShardformer", "Model", "open_checkpoint", "read_spec"]
