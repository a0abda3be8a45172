"""The backends that there are, and the choice among them. Adding one: a class in a file of its own, and a line here."""

from .base import AttentionBackend, AttentionSpec
from .cpu import CpuBackend
from .eager import EagerBackend
from .triton import TritonBackend

# The fastest first. What a backend needs that not every machine has is imported when it is bound, not with its class.
_BACKENDS: tuple[type[AttentionBackend], ...] = (
    TritonBackend,
    CpuBackend,
    EagerBackend,
)
BACKENDS: dict[str, type[AttentionBackend]] = {backend.name: backend for backend in _BACKENDS}
CHOICES = ("auto", "tuned")  # names that are no backend's: each layer has one chosen for it


def auto_backend(spec: AttentionSpec) -> str:
    """The fastest backend that can serve such a layer."""
    return next(n for n, backend in BACKENDS.items() if backend.is_automatic(spec) and not backend.validate(spec))


def create_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend of that name, or with "auto" the fastest that works. Raises ValueError with every reason."""
    if name == "auto":
        name = auto_backend(spec)
    if name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    reasons = BACKENDS[name].validate(spec)
    if reasons:
        raise ValueError(f"attention_backend={name!r} cannot serve here: {'; '.join(reasons)}")
    return BACKENDS[name](spec)
