"""Attention in plain torch."""

from typing import Any

from torch import Tensor

from ...kernels import eager
from .base import AttentionBackend, AttentionSpec, Sequences


class EagerBackend(AttentionBackend):
    """On any device and dtype: gathers the blocks, then torch's scaled_dot_product_attention where that suffices."""

    name = "eager"

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        return []

    @property
    def plan_key(self) -> str:  # its masks are the window's
        return self.name if self.spec.window is None else f"{self.name}, window {self.spec.window}"

    def prepare(self, sequences: Sequences) -> eager.AttentionPlan:
        return eager.plan_attention(
            sequences.query_lens,
            sequences.key_lens,
            sequences.block_tables,
            sequences.block_size,
            self.spec.dtype,
            self.spec.device,
            self.spec.window,
        )

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return eager.paged_attention(query, key_cache, value_cache, plan, self.spec.scale, self.features(sinks))
