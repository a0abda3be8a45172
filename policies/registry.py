"""Which policy serves which architecture: one line a family."""

from collections.abc import Iterable

from .base import Policy
from .llama import LLAMA

POLICIES: tuple[Policy, ...] = (LLAMA,)


def supported_architectures() -> list[str]:
    return sorted(name for policy in POLICIES for name in policy.architectures)


def find_policy(architectures: Iterable[str]) -> Policy:
    """The policy for a config's `architectures`. Raises ValueError listing the supported ones."""
    wanted = list(architectures)
    for policy in POLICIES:
        if any(name in policy.architectures for name in wanted):
            return policy
    raise ValueError(
        f"architecture {', '.join(wanted) or '(none named in config.json)'} is not supported; "
        f"supported: {', '.join(supported_architectures())}"
    )
