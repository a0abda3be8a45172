"""The backends that there are, and the choice among them. Adding one: a class in a file of its own, and a line here."""

import warnings
from collections.abc import Iterator

from .base import AttentionBackend, AttentionSpec
from .cpu import CpuBackend
from .eager import EagerBackend
from .flash import FlashBackend
from .triton import TritonBackend

# The fastest first. What a backend needs that not every machine has is imported when it is bound, not with its class.
_BACKENDS: tuple[type[AttentionBackend], ...] = (
    FlashBackend,
    TritonBackend,
    CpuBackend,
    EagerBackend,
)
BACKENDS: dict[str, type[AttentionBackend]] = {backend.name: backend for backend in _BACKENDS}
CHOICES = ("auto", "tuned")  # names that are no backend's: each layer has one chosen for it


def automatic_backends(spec: AttentionSpec) -> Iterator[str]:
    """Those that "auto" may choose for such a layer, the fastest first; the last one always works."""
    return (name for name, backend in BACKENDS.items() if backend.is_automatic(spec) and not backend.validate(spec))


def auto_backend(spec: AttentionSpec) -> str:
    """The fastest backend that can serve such a layer."""
    return next(automatic_backends(spec))


def why_not(name: str, spec: AttentionSpec) -> str | None:
    """Every reason why the backend of that name cannot serve such a layer, in one line; None if it can."""
    return "; ".join(BACKENDS[name].validate(spec)) or None


def create_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend of that name, or with "auto" the fastest that works. Raises ValueError with every reason."""
    reason: str | None = None
    if name == "auto":
        for choice in automatic_backends(spec):
            try:
                return BACKENDS[choice](spec)
            except ImportError as error:  # what it needs is installed, and broken
                reason = str(error)
                warnings.warn(f"attention_backend='auto' passes over {choice!r}: {reason}", stacklevel=2)
    elif name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is unknown; known: {', '.join((*CHOICES, *BACKENDS))}")
    else:
        reason = why_not(name, spec)
        if reason is None:
            try:
                return BACKENDS[name](spec)
            except ImportError as error:
                reason = str(error)
    raise ValueError(f"attention_backend={name!r} cannot serve here: {reason}")
