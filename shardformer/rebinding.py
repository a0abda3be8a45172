"""Another attention backend for a stage that is running: tried on every layer first, then taken by all or by none."""

import torch

from .attention import PagedAttention
from .backends import AttentionBackend, Sequences, create_backend
from .stage import PipelineStage

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far from eager, as a share of the largest value: a few roundings, far below what a wrong mask does."""

_TRIAL = ((1, 17), (3, 12), (5, 5), (1, 1))  # (queries, keys): a decode, a chunk, a prompt, a second decode


def try_backend(stage: PipelineStage, name: str, block_size: int, live: Sequences | None) -> list[AttentionBackend]:
    """A backend of that name (or "auto"'s choice) for each attention layer, in order; the stage keeps its own.

    Each must reproduce eager on random keys and values, and on the layer's cache with the sequences of the last step
    (`live`), where there was one. Raises ValueError with the reason.
    """
    backends = []
    tried = set()
    for attention in stage.attentions:
        backend = create_backend(name, attention.backend.spec)
        backends.append(backend)
        if backend.spec in tried or type(backend) is type(attention.backend):
            continue
        tried.add(backend.spec)
        sequences = _trial(block_size, backend.spec.device)
        num_blocks = 1 + max(block for table in sequences.block_tables for block in table)
        shape = (2, num_blocks, block_size, backend.spec.num_kv_heads, backend.spec.head_dim)
        key_cache, value_cache = torch.randn(shape, dtype=backend.spec.dtype, device=backend.spec.device)
        _compare(backend, key_cache, value_cache, sequences)
        if live is not None:
            _compare(backend, attention.key_cache, attention.value_cache, live)
    return backends


def bind(stage: PipelineStage, backends: list[AttentionBackend]) -> None:
    """Gives each attention layer its new backend."""
    for attention, backend in zip(stage.attentions, backends, strict=True):
        assert isinstance(attention, PagedAttention)
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
    expected = eager.forward(query, key_cache, value_cache, eager.prepare(sequences), sinks).float()
    ours = backend.forward(query, key_cache, value_cache, backend.prepare(sequences), sinks).float()
    limit = TOLERANCE[spec.dtype] * max(1.0, expected.abs().max().item())
    error = (ours - expected).abs().max().item()
    if not error <= limit:  # NaN too
        raise ValueError(
            f"attention_backend={backend.name!r} does not reproduce eager here: off by {error:.2g} where {limit:.2g} "
            f"is rounding ({spec.dtype}, head_dim={spec.head_dim}, {len(sequences.query_lens)} sequences)"
        )
