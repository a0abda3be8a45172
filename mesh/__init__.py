"""Process mesh, collectives, and the starting and joining of ranks. Knows nothing of models."""

from .collectives import Communicator
from .process_group_mesh import CollectiveError, ProcessGroupMesh

__all__ = ["CollectiveError", "Communicator", "ProcessGroupMesh"]
