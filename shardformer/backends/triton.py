"""Attention as a Triton kernel, which is imported when a layer binds it."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...kernels.batch import PagedBatch
from .base import AttentionBackend, AttentionSpec, Sequences

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256


class TritonBackend(AttentionBackend):
    """One kernel for prompts, chunks and decodes, on NVIDIA GPUs; on the CPU in Triton's interpreter, for tests."""

    name = "triton"
    supports_graphs = True

    def __init__(self, spec: AttentionSpec) -> None:
        from ...kernels.paged_attention import paged_attention

        super().__init__(spec)
        self.paged_attention = paged_attention

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        reasons = []
        if find_spec("triton") is None:
            reasons.append("the package triton is not installed")
        if spec.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(spec.device)
            if major < 8:
                reasons.append(f"{spec.device} has compute capability {major}.{minor}, Triton's products need 8.0")
        elif not _is_interpreted():
            reasons.append(f"the device is {spec.device}, not a GPU (for tests, TRITON_INTERPRET=1 interprets kernels)")
        elif spec.dtype is torch.bfloat16:
            reasons.append("Triton's interpreter has no bfloat16 products")
        if spec.dtype not in _DTYPES:
            reasons.append(f"dtype {spec.dtype} is not one of {', '.join(map(str, _DTYPES))}")
        if spec.head_dim > _MAX_HEAD_DIM:
            reasons.append(f"heads of {spec.head_dim} elements are larger than {_MAX_HEAD_DIM}")
        return reasons

    @staticmethod
    def is_automatic(spec: AttentionSpec) -> bool:
        return spec.device.type == "cuda"  # the interpreter is for tests

    def prepare(self, sequences: Sequences) -> PagedBatch:
        return sequences.batch

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        return self.paged_attention(query, key_cache, value_cache, plan, self.spec.scale, self.features(sinks))


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
