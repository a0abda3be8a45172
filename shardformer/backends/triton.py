"""Attention as a Triton kernel, which is imported when a layer binds it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.batch import PagedBatch
from .base import AttentionBackend, AttentionSpec, Sequences

if TYPE_CHECKING:
    from ...kernels.paged_attention import Tile

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256
_MAX_LATENT = (64, 512)  # elements of a key before its value, and of the value, where values are in keys


class TritonBackend(AttentionBackend):
    """One kernel for prompts, chunks and decodes, on NVIDIA GPUs; on the CPU in Triton's interpreter, for tests."""

    name = "triton"
    supports_graphs = True

    def __init__(
        self, spec: AttentionSpec, narrow: Sequence[int] | None = None, wide: Sequence[int] | None = None
    ) -> None:
        """narrow, wide: the numbers of a `Tile` for decodes and one for prompts, in place of the usual ones."""
        from ...kernels.paged_attention import Tile, paged_attention

        super().__init__(spec)
        self.paged_attention = paged_attention
        self.group = spec.num_heads // spec.num_kv_heads
        self.tiles: tuple[Tile, Tile] | None = None
        if narrow is not None or wide is not None:
            usual = [tiles[0] for tiles in _tile_choices(spec)]
            given = [
                kind if numbers is None else Tile(*numbers) for kind, numbers in zip(usual, (narrow, wide), strict=True)
            ]
            self.tiles = given[0], given[1]

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
        if spec.values_in_keys:
            sizes = spec.head_dim - spec.value_size, spec.value_size
            if any(size > most for size, most in zip(sizes, _MAX_LATENT, strict=True)):
                reasons.append(
                    f"keys of {sizes[0]} + {sizes[1]} elements are larger than {_MAX_LATENT[0]} + {_MAX_LATENT[1]}"
                )
        elif max(spec.head_dim, spec.value_size) > _MAX_HEAD_DIM:
            size = max(spec.head_dim, spec.value_size)
            reasons.append(f"heads of {size} elements are larger than {_MAX_HEAD_DIM}")
        return reasons

    @staticmethod
    def is_automatic(spec: AttentionSpec) -> bool:
        return spec.device.type == "cuda"  # the interpreter is for tests

    @staticmethod
    def variants(spec: AttentionSpec) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        narrow, wide = ([astuple(tile) for tile in tiles[1:]] for tiles in _tile_choices(spec))
        return {"decode": [{"narrow": tile} for tile in narrow], "prefill": [{"wide": tile} for tile in wide]}

    def prepare(self, sequences: Sequences) -> PagedBatch:
        return sequences.batch

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        features = self.features(sinks)
        tiles = self.tiles
        if tiles is not None and tiles[0].rows < plan.max_query_len * self.group < tiles[1].rows:
            tiles = None  # between a decode and a prompt, which were timed: for a few queries there are better ones
        return self.paged_attention(query, key_cache, value_cache, plan, self.spec.scale, features, tiles=tiles)


def _tile_choices(spec: AttentionSpec) -> "tuple[list[Tile], list[Tile]]":
    from ...kernels.paged_attention import Heads, tile_choices

    heads = Heads.of(spec.head_dim, spec.value_dim, spec.values_in_keys)
    return tile_choices(spec.num_heads // spec.num_kv_heads, heads, spec.dtype, spec.device)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
