"""Attention in C++ on the CPU, which reads the blocks where they lie: `kernels/cpu/paged_attention.cpp`."""

from typing import Any

from torch import Tensor

from ...kernels.batch import PagedBatch
from ...kernels.cpu import CpuOps, Unavailable
from .base import AttentionBackend, AttentionSpec, Sequences

_MAX_HEAD_DIM = 256


class CpuBackend(AttentionBackend):
    """One kernel for prompts, chunks and decodes."""

    name = "cpu"
    supports_graphs = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.paged_attention = CpuOps(spec.dtype).paged_attention

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        if spec.device.type != "cpu":
            return [f"the device is {spec.device}, not a CPU"]
        try:
            multiple = CpuOps(spec.dtype).head_dim_multiple
        except Unavailable as reason:
            return [str(reason)]
        fits = spec.head_dim % multiple == 0 and spec.head_dim <= _MAX_HEAD_DIM
        return [] if fits else [f"head_dim={spec.head_dim} is not a multiple of {multiple} up to {_MAX_HEAD_DIM}"]

    def prepare(self, sequences: Sequences) -> PagedBatch:
        return sequences.batch

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return self.paged_attention(query, key_cache, value_cache, plan, self.spec.scale, self.features(sinks))
