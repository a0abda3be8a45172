"""Process mesh, collectives, and the starting and joining of ranks. Knows nothing of models."""

from .collectives import CollectiveError, Communicator
from .process_group_mesh import ProcessGroupMesh

__all__ = ["CollectiveError", "Communicator", "ProcessGroupMesh"]
