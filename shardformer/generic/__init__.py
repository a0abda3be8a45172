"""Transformers' own decoder layers on our mesh: sharded by transformers' tables, cut into stages, with our attention.

interfaces.py   how a layer reaches our attention and experts
trace.py        what layers ask of attention, seen by running them without data
head.py         from hidden states to logits, as the family does it
spec.py         from a config to a `GenericSpec`
layers.py       what takes the place of transformers' modules
stage.py        `GenericStage`
proof.py        what is proved once the weights are there
"""

from .spec import read_generic, transformers_class
from .stage import GenericStage

__all__ = ["GenericStage", "read_generic", "transformers_class"]
