"""What layers have bound, and why nothing else: plain data, for `InferenceEngine.describe`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from .base import AttentionBackend
from .registry import BACKENDS, CHOICES

Refusals: TypeAlias = tuple[tuple[str, str], ...]
"""Another backend, and every reason why it was not bound."""


@dataclass(frozen=True)
class Bound:
    """Layers of one rank that have bound the same backend, others being refused for the same reasons."""

    name: str  # its `label`
    layers: tuple[int, ...]  # of the whole model
    refused: Refusals
    tuned: tuple[str, ...] = ()  # what timing has found, where it was asked; more than one if the layers differ


def describe_bound(asked: str, backends: Iterable[AttentionBackend], first_layer: int) -> tuple[Bound, ...]:
    """What was bound when a backend, "auto" or "tuned" was asked for; `backends`: of layers in order."""
    layers: dict[tuple[str, Refusals], list[int]] = {}
    tuned: dict[tuple[str, Refusals], dict[str, None]] = {}
    known = {}  # layers are mostly alike
    for index, backend in enumerate(backends, first_layer):
        alike = backend.label, backend.spec
        if alike not in known:
            known[alike] = _refused(asked, backend)
        key = backend.label, known[alike]
        layers.setdefault(key, []).append(index)
        if backend.tuning is not None:
            tuned.setdefault(key, {})[str(backend.tuning)] = None
    return tuple(
        Bound(name, tuple(indices), refused, tuple(tuned.get((name, refused), ())))
        for (name, refused), indices in layers.items()
    )


def _refused(asked: str, bound: AttentionBackend) -> Refusals:
    found = []
    device = bound.spec.device
    for name, backend in BACKENDS.items():
        if name == bound.name:
            continue
        # Without the device's number, so that ranks that differ in nothing else read alike.
        reason = "; ".join(backend.validate(bound.spec)).replace(str(device), device.type)
        if not reason and asked not in CHOICES:
            reason = "not asked for"
        elif not reason and not backend.is_automatic(bound.spec):
            reason = f"taken on {device.type} only where it is asked for by its name"
        elif not reason and bound.tuning is not None:
            reason = bound.tuning.failed.get(name, "slower")
        found.append((name, reason or "slower"))
    return tuple(found)
