"""Another attention backend for a stage that is running: tried on every layer first, then taken by all or by none."""

from dataclasses import replace
from functools import partial

import torch

from .backends import AttentionBackend, Sequences, Workload, create_backend, tune
from .backends.proof import difference
from .base import Stage

_TRIAL = ((1, 17), (3, 12), (5, 5), (1, 1))  # (queries, keys): a decode, a chunk, a prompt, a second decode


def try_backend(
    stage: Stage, name: str, block_size: int, live: Sequences | None, workload: Workload
) -> list[AttentionBackend]:
    """A backend of that name (or what "auto" or "tuned" choose) for each attention layer, in order; the stage keeps its
    own. workload: what "tuned" is to be fast at.

    Each must reproduce eager on random keys and values, and on the layer's cache with the sequences of the last step
    (`live`), where there was one. Raises ValueError with the reason.
    """
    specs = [replace(attention.backend.spec, block_size=block_size) for attention in stage.attentions]
    backends = tune(specs, workload) if name == "tuned" else [create_backend(name, spec) for spec in specs]
    tried = set()
    for attention, backend in zip(stage.attentions, backends, strict=True):
        if backend.spec in tried or (type(backend) is type(attention.backend) and backend.tuning is None):
            continue
        tried.add(backend.spec)
        sequences = _trial(block_size, backend.spec.device)
        num_blocks = 1 + max(block for table in sequences.block_tables for block in table)
        make = partial(torch.randn, dtype=backend.spec.dtype, device=backend.spec.device)
        _compare(backend, *backend.spec.caches(num_blocks, block_size, make), sequences)
        if live is not None:
            _compare(backend, attention.key_cache, attention.value_cache, live)
    return backends


def bind(stage: Stage, backends: list[AttentionBackend]) -> None:
    """Gives each attention layer its new backend."""
    for attention, backend in zip(stage.attentions, backends, strict=True):
        attention.backend = backend


def _trial(block_size: int, device: torch.device) -> Sequences:
    """Over blocks in no order."""
    query_lens, key_lens = zip(*_TRIAL, strict=True)
    counts = [-(-length // block_size) for length in key_lens]
    blocks = list(range(sum(counts)))
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    return Sequences.of(query_lens, key_lens, tables, block_size, device)


@torch.inference_mode()
def _compare(
    backend: AttentionBackend, key_cache: torch.Tensor, value_cache: torch.Tensor, sequences: Sequences
) -> None:
    spec = backend.spec
    query = torch.randn(sum(sequences.query_lens), spec.num_heads, spec.head_dim, dtype=spec.dtype, device=spec.device)
    sinks = torch.randn(spec.num_heads, dtype=spec.dtype, device=spec.device) if spec.has_sinks else None
    eager = create_backend("eager", spec)
    expected = eager.forward(query, key_cache, value_cache, eager.prepare(sequences), sinks)
    ours = backend.forward(query, key_cache, value_cache, backend.prepare(sequences), sinks)
    wrong = difference(ours, expected)
    if wrong is not None:
        raise ValueError(
            f"attention_backend={backend.name!r} does not reproduce eager here: {wrong} "
            f"({spec.dtype}, head_dim={spec.head_dim}, {len(sequences.query_lens)} sequences)"
        )
