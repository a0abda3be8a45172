"""Which policy serves which architecture: one line a family."""

from collections.abc import Iterable
from difflib import get_close_matches

from .base import Policy
from .llama import LLAMA

POLICIES: tuple[Policy, ...] = (LLAMA,)


def supported_architectures() -> list[str]:
    return sorted(name for policy in POLICIES for name in policy.architectures)


def find_policy(architectures: Iterable[str]) -> Policy:
    """The policy for a config's `architectures`. Raises ValueError naming the nearest supported ones."""
    wanted = list(architectures)
    for policy in POLICIES:
        if any(name in policy.architectures for name in wanted):
            return policy
    if not wanted:
        raise ValueError("config.json names no architecture")
    nearest = get_close_matches(wanted[0], supported_architectures(), n=3, cutoff=0.0)
    raise ValueError(f"architecture {', '.join(wanted)} is not supported; nearest supported: {', '.join(nearest)}")
