"""Attention in C++ on the CPU, which reads the blocks where they lie: `kernels/cpu/paged_attention.cpp`."""

from typing import Any

from torch import Tensor

from ...kernels.batch import PagedBatch
from ...kernels.cpu import CpuOps, Unavailable
from .base import AttentionBackend, AttentionSpec, Sequences


class CpuBackend(AttentionBackend):
    """One kernel for prompts, chunks and decodes."""

    name = "cpu"
    supports_graphs = supports_tapes = True

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.paged_attention = CpuOps(spec.dtype).paged_attention

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        if spec.device.type != "cpu":
            return [f"the device is {spec.device}, not a CPU"]
        try:
            ops = CpuOps(spec.dtype)
        except Unavailable as reason:
            return [str(reason)]
        multiple, most = ops.head_dim_multiple, ops.max_head_dim
        sizes = {"head_dim": spec.head_dim, "value_dim": spec.value_size}
        if spec.value_size == spec.head_dim:
            sizes.pop("value_dim")
        return [
            f"{name}={size} is not a multiple of {multiple} up to {most}"
            for name, size in sizes.items()
            if size % multiple or size > most
        ]

    def prepare(self, sequences: Sequences) -> PagedBatch:
        return sequences.batch

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return self.paged_attention(query, key_cache, value_cache, plan, self.spec.scale, self.features(sinks))
