"""FlashAttention, from whichever library is there; what that does not serve, Triton's kernel does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.batch import to_device
from .base import AttentionBackend, AttentionSpec, Sequences
from .flash_libraries import LIBRARIES, Library, compute_capability
from .triton import TritonBackend

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Part:
    """The sequences of a step that one backend serves."""

    backend: AttentionBackend
    plan: Any  # what it made of them
    rows: Tensor | None  # [num_tokens of theirs] int64: where in the step; None: they are all of it


class FlashBackend(AttentionBackend):
    """The first of the libraries that can serve the layer, chosen when it is bound."""

    name = "flash"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.library = _load(spec)
        self.rest = None if self.library.serves_all else TritonBackend(spec)
        self.preferred_block_size = self.library.preferred_block_size

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        reasons = []
        if compute_capability(spec.device) is None:
            reasons.append(f"the device is {spec.device}, not a CUDA GPU")
        if spec.dtype not in _DTYPES:
            reasons.append(f"dtype {spec.dtype} is not one of {', '.join(map(str, _DTYPES))}")
        if spec.head_dim % 8 or spec.head_dim > _MAX_HEAD_DIM:
            reasons.append(f"head_dim={spec.head_dim} is not a multiple of 8 up to {_MAX_HEAD_DIM}")
        if spec.value_size != spec.head_dim or spec.values_in_keys:
            where = " within the keys" if spec.values_in_keys else ""
            reasons.append(f"values of {spec.value_size} elements{where} beside keys of {spec.head_dim}")
        if not _usable(spec):
            installed = [library for library in LIBRARIES if library.is_installed()]
            reasons += [f"{library.name} {reason}" for library in installed for reason in library.validate(spec)]
            missing = [_wanted(library) for library in LIBRARIES if library not in installed]
            if missing:
                reasons.append(f"not installed: {', '.join(missing)}")
        return reasons

    # Nothing was measured here. By their authors' figures, kernels written for a generation of devices are the fastest
    # on it; on later ones FlashAttention-2's are about half as fast, and less than what Triton compiles for them. A
    # library that leaves decodes to Triton wins in prefill only, and may ask for larger blocks: only by name.
    @staticmethod
    def is_automatic(spec: AttentionSpec) -> bool:
        usable = _usable(spec)
        return bool(usable) and usable[0].is_automatic(spec)

    @property
    def label(self) -> str:
        rest = "" if self.rest is None else " and triton"
        return f"{self.name} ({self.library.name}{rest})"

    @property
    def plan_key(self) -> str:
        return self.label

    def prepare(self, sequences: Sequences) -> list[Part]:
        backends: list[AttentionBackend] = [
            self.library if self.rest is None or self.library.serves(*lens) else self.rest
            for lens in zip(sequences.query_lens, sequences.key_lens, strict=True)
        ]
        parts = []
        for backend in dict.fromkeys(backends):
            mine = [index for index, other in enumerate(backends) if other is backend]
            is_all = len(mine) == len(backends)
            rows = None if is_all else to_device(_rows(sequences.query_lens, mine), self.spec.device)
            parts.append(
                Part(backend, backend.prepare(sequences if is_all else _only(sequences, mine, self.spec.device)), rows)
            )
        return parts

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        if len(plan) == 1:
            return plan[0].backend.forward(query, key_cache, value_cache, plan[0].plan, sinks)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in plan:
            its_own = query.index_select(0, part.rows)
            out.index_copy_(0, part.rows, part.backend.forward(its_own, key_cache, value_cache, part.plan, sinks))
        return out


def _usable(spec: AttentionSpec) -> list[type[Library]]:
    return [library for library in LIBRARIES if not library.validate(spec)]


def _wanted(library: type[Library]) -> str:
    return library.package + (f" >= {library.oldest}" if library.oldest else "")


def _load(spec: AttentionSpec) -> Library:
    """The first usable library that can be imported: one may have been built for another torch. Raises ImportError."""
    failed = []
    for library in _usable(spec):
        try:
            return library(spec)
        except (ImportError, OSError) as error:
            failed.append(f"{library.name} cannot be imported: {' '.join(str(error).split())}")
    raise ImportError("; ".join(failed))


def _only(sequences: Sequences, which: Sequence[int], device: torch.device) -> Sequences:
    return Sequences.of(
        query_lens=[sequences.query_lens[i] for i in which],
        key_lens=[sequences.key_lens[i] for i in which],
        block_tables=[sequences.block_tables[i] for i in which],
        block_size=sequences.block_size,
        device=device,
    )


def _rows(query_lens: Sequence[int], which: Sequence[int]) -> Tensor:
    """Of the sequences' tokens in the step, [num_tokens of theirs] int64."""
    starts = np.concatenate(([0], np.cumsum(query_lens)))
    return torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in which]))
