"""What a rank is, how it joins the others, and what is said of one that fails. `own_ranks` and `torchrun` are the two
ways in which ranks come about.
"""

import os
import pickle
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # now: imported later, as by transformers, its defaults hold the process group

from .collectives import CollectiveError, Communicator


class RankFailure(RuntimeError):
    """A rank failed to start, raised, or died; names the rank, its place, how it ended and its last words."""


@dataclass(frozen=True)
class Failure:
    """A rank's last message: what went wrong on it."""

    traceback: str
    error: Exception | None  # a ValueError that is for the user, to be raised as it is
    lost_peer: bool  # a collective failed, as it does on every rank once another is gone

    @classmethod
    def of(cls, error: Exception, for_user: bool = True) -> "Failure":
        """for_user: whether a ValueError can be the user's mistake."""
        text = "".join(traceback.format_exception(error))
        told = portable(error) if for_user and isinstance(error, ValueError) else None
        return cls(text, told, isinstance(error, CollectiveError))


def portable(error: Exception) -> Exception:
    """The exception itself, or where it does not survive the way to another process, its name and words."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        return kind(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class RankPlace:
    """Where a rank stands among its peers."""

    rank: int
    world_size: int
    local_rank: int  # on its host
    local_world_size: int

    @property
    def is_crowded(self) -> bool:
        """Whether its host has more ranks than cores, so that waiting must not keep one busy."""
        return self.local_world_size > available_cores()


def divide_threads(local_world_size: int) -> None:
    """Gives this rank its share of the cores that the process may use."""
    torch.set_num_threads(max(1, available_cores() // local_world_size))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def init_process_group(place: RankPlace, device: torch.device, timeout_s: float, store: dist.Store | None) -> None:
    """Joins the world's process group: gloo, and NCCL beside it where the device is a GPU.

    timeout_s: for a collective, and for the ranks to meet as well: torch has one timeout for both.
    store: where to meet; None for torchrun's.
    """
    timeout = timedelta(seconds=timeout_s)
    if store is None:
        base, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a group, whose addresses would be taken for those of the next one.
        number = base.add(f"meshlm/groups that rank {place.rank} joined", 1)
        store = dist.PrefixStore(f"meshlm/group {number}", base)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )


def gpu_of(device: torch.device) -> str | None:
    """What tells a GPU from all others, however a process numbers those it sees; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def choose_backend(gpu: str | None, timeout_s: float) -> str:
    """The backend for tensors of the ranks' devices: collective over the world's group.

    gpu: this rank's, from `gpu_of`. NCCL, but gloo where any two ranks share a GPU, as tests do (device='cuda:0'), and
    on CPUs. With gloo, tensors of a GPU want a `StagedCommunicator`.
    """
    if gpu is None:
        return "gloo"
    gpus = Communicator(dist.group.WORLD, "world", timeout_s).all_gather_object(gpu)
    return "nccl" if len(set(gpus)) == len(gpus) else "gloo"
