"""The libraries with FlashAttention's kernels, each as a backend of its own: what it can do, and how it is called.

Signatures and limits are those of FlashAttention-3 at commit 01afd16, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36, flash-attn
2.8.3 and torch 2.13. No library is imported before a layer binds it.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import accumulate
from runpy import run_path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ...kernels.batch import PagedBatch, to_device
from .base import AttentionBackend, AttentionSpec, Sequences
from .triton import TritonBackend


class Library(AttentionBackend):
    """One that reads the cache through block tables and serves every sequence, where it does not say otherwise."""

    package: ClassVar[str]  # what to install
    function: ClassVar[tuple[str, str]]  # (module, name)
    extras: ClassVar[frozenset[str]]  # of `AttentionSpec.features`, those that it has
    majors: ClassVar[tuple[int, ...]]  # of the compute capabilities that it has kernels for
    made_for: ClassVar[tuple[int, ...]]  # those of them that its kernels were written for
    supports_graphs = False  # none has been tried: "auto" keeps to what runs decodes from CUDA graphs
    oldest: ClassVar[str | None] = None  # version that can be called
    block_multiple: ClassVar[int] = 1  # of which block sizes must be multiples

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        module, name = self.function
        self.attend = getattr(import_module(module), name)
        self.serves_all = self.can_serve_all(spec)
        # (left, right): keys seen before and after a query's own; the flag `causal` sees to the right where it is -1
        self.window = (-1, -1) if spec.window is None else (spec.window - 1, 0)
        self.softcap = spec.softcap or 0.0

    @classmethod
    @abstractmethod
    def is_installed(cls) -> bool:
        """Whether it is there, in a version that can be called; found out without importing it."""

    @classmethod
    def validate(cls, spec: AttentionSpec) -> list[str]:
        if not cls.is_installed():
            return ["is not installed"]
        capability = compute_capability(spec.device)
        reasons = [f"has no {name}" for name in spec.features if name not in cls.extras]
        if capability is not None and capability[0] not in cls.majors:
            reasons.append(f"has no kernels for compute capability {capability[0]}.{capability[1]}")
        if spec.block_size is not None and spec.block_size % cls.block_multiple:
            reasons.append(f"needs block sizes that are multiples of {cls.block_multiple}, not {spec.block_size}")
        if not cls.can_serve_all(spec):
            reasons += [f"leaves decodes to Triton: {reason}" for reason in TritonBackend.validate(spec)]
        return reasons

    @classmethod
    def can_serve_all(cls, spec: AttentionSpec) -> bool:
        """Whether it serves decodes well, too: with the keys of a sequence split over programs. Else Triton does."""
        return True

    @classmethod
    def is_automatic(cls, spec: AttentionSpec) -> bool:
        capability = compute_capability(spec.device)
        made_for_it = capability is not None and capability[0] in cls.made_for
        return made_for_it and cls.can_serve_all(spec) and cls.supports_graphs

    def serves(self, query_len: int, key_len: int) -> bool:
        """Whether it serves such a sequence."""
        return self.serves_all or query_len > 1

    def prepare(self, sequences: Sequences) -> Any:
        return sequences.batch


class FlashAttention3(Library):
    """For Hopper. A build may leave parts out, which its config module says: one without pages serves fresh prompts.

    It could serve chunks as well, but their keys, gathered, would take memory that nobody has set aside.
    """

    name = "FlashAttention-3"
    package = "flash_attn_3"
    function = ("flash_attn_interface", "flash_attn_with_kvcache")
    config = "flash_attn_config"
    extras = frozenset(("window", "softcap"))
    majors = made_for = (9,)

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.has_pages = self._has("PAGEDKV")
        if not self.has_pages:
            self.attend = import_module(self.function[0]).flash_attn_varlen_func

    @classmethod
    def is_installed(cls) -> bool:
        return find_spec(cls.function[0]) is not None

    @classmethod
    def _has(cls, part: str) -> bool:
        """Whether the build has a part; one that says nothing has all."""
        config = find_spec(cls.config)
        return config is None or config.origin is None or not _build_flags(config.origin).get(f"{_DISABLE}{part}")

    @classmethod
    def validate(cls, spec: AttentionSpec) -> list[str]:
        reasons = super().validate(spec)
        if not cls.is_installed():
            return reasons
        wanted = {"LOCAL": "window" in spec.features, "SOFTCAP": "softcap" in spec.features}
        wanted |= {"FP16": spec.dtype is torch.float16, "VARLEN": True}
        reasons += [
            f"was built without {part}" for part, is_wanted in wanted.items() if is_wanted and not cls._has(part)
        ]
        largest = max((size for size in _HEAD_SIZES if cls._has(f"HDIM{size}")), default=0)
        if largest < spec.head_dim <= max(_HEAD_SIZES):
            reasons.append(f"was built for heads of up to {largest} elements, not {spec.head_dim}")
        return reasons

    @classmethod
    def can_serve_all(cls, spec: AttentionSpec) -> bool:
        return cls._has("PAGEDKV") and cls._has("SPLIT")

    def serves(self, query_len: int, key_len: int) -> bool:
        return super().serves(query_len, key_len) if self.has_pages else 1 < query_len == key_len

    def prepare(self, sequences: Sequences) -> Any:
        return super().prepare(sequences) if self.has_pages else Gathered.of(sequences, self.spec.device)

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        common = {
            "softmax_scale": self.spec.scale,
            "causal": True,
            "window_size": self.window,
            "softcap": self.softcap,
        }
        out: Tensor
        if self.has_pages:
            out = self.attend(
                query,
                key_cache,
                value_cache,
                cache_seqlens=plan.key_lens,
                page_table=plan.block_tables,
                cu_seqlens_q=plan.query_starts,
                max_seqlen_q=plan.max_query_len,
                **common,
            )
        else:
            out = self.attend(
                query,
                key_cache.flatten(0, 1).index_select(0, plan.slots),
                value_cache.flatten(0, 1).index_select(0, plan.slots),
                cu_seqlens_q=plan.starts,
                cu_seqlens_k=plan.starts,
                max_seqlen_q=plan.longest,
                max_seqlen_k=plan.longest,
                **common,
            )
        return out


_DISABLE = "FLASHATTENTION_DISABLE_"
_HEAD_SIZES = (64, 96, 128, 192, 256)


@cache
def _build_flags(path: str) -> Mapping[str, bool]:
    """What FlashAttention-3's config module says of the build; the file is run, no module is imported."""
    flags: Mapping[str, bool] = run_path(path)["CONFIG"]["build_flags"]
    return flags


class FlashAttention3Forward(FlashAttention3):
    """The same from the package index, built for fewer cases."""

    name = "FlashAttention-3, forward only"
    package = "fa3-fwd"
    function = ("fa3_fwd_interface", "flash_attn_with_kvcache")
    config = "fa3_fwd_config"


@dataclass(frozen=True)
class Gathered:
    """Whole prompts, whose keys are to be gathered from the cache."""

    slots: Tensor  # [num_tokens] int64: where each token's key and value lie, block * block_size + offset
    starts: Tensor  # [num_seqs + 1] int32: of each prompt's rows
    longest: int

    @classmethod
    def of(cls, sequences: Sequences, device: torch.device) -> "Gathered":
        assert list(sequences.query_lens) == list(sequences.key_lens)
        size, slots = sequences.block_size, []
        for length, blocks in zip(sequences.key_lens, sequences.block_tables, strict=True):
            place = np.arange(length)
            slots.append(np.asarray(blocks, dtype=np.int64)[place // size] * size + place % size)
        return cls(
            slots=to_device(torch.from_numpy(np.concatenate(slots)), device),
            starts=_starts(sequences.query_lens, device),
            longest=max(sequences.query_lens),
        )


def _starts(lens: Any, device: torch.device) -> Tensor:
    """[len(lens) + 1] int32: sums of the lengths before each."""
    return to_device(torch.tensor([0, *accumulate(lens)], dtype=torch.int32), device)


class FlashAttention4(Library):
    """For Blackwell; on Hopper it does not split keys."""

    name = "FlashAttention-4"
    package = "flash-attn-4"
    function = ("flash_attn.cute", "flash_attn_varlen_func")
    extras = frozenset(("window", "softcap", "sinks"))
    majors = (9, 10, 11)
    made_for = (10, 11)
    preferred_block_size = 128  # a tile of keys; smaller ones cost decodes three times as long, say its authors
    oldest = "4.0.0b30"  # older ones take sinks in bfloat16 only

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.num_splits = 0 if self.serves_all else 1  # 0: it chooses
        self.open_window = (None, None) if spec.window is None else self.window

    @classmethod
    def is_installed(cls) -> bool:
        # Not to be found by its module: flash-attn 2.8 brings an early flash_attn.cute along, without pages.
        return _is_at_least(cls.package, cls.oldest)

    @classmethod
    def validate(cls, spec: AttentionSpec) -> list[str]:
        reasons = super().validate(spec)
        capability = compute_capability(spec.device)
        if cls.is_installed() and capability is not None and capability[0] > 9 and 128 < spec.head_dim <= 256:
            reasons.append(f"has heads of up to 128 elements on this device, not {spec.head_dim}")
        return reasons

    @classmethod
    def can_serve_all(cls, spec: AttentionSpec) -> bool:
        capability = compute_capability(spec.device)
        return capability is not None and capability[0] > 9

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        out: Tensor
        out, _ = self.attend(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=plan.query_starts,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_key_len,
            seqused_k=plan.key_lens,
            page_table=plan.block_tables,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self.open_window,
            learnable_sink=sinks,
            softcap=self.softcap,
            num_splits=self.num_splits,
        )
        return out


@dataclass(frozen=True)
class CountedKeys:
    """A batch, and its keys counted up."""

    batch: PagedBatch
    key_starts: Tensor  # [num_seqs + 1] int32


class FlashAttention2(Library):
    """For Ampere and Ada, on later devices too."""

    name = "FlashAttention-2"
    package = "flash-attn"
    function = ("flash_attn", "flash_attn_varlen_func")
    extras = frozenset(("window", "softcap", "ALiBi"))
    majors = (8, 9, 10, 11, 12)
    made_for = (8,)
    block_multiple = preferred_block_size = 256
    oldest = "2.6"  # the first with softcap

    @classmethod
    def is_installed(cls) -> bool:
        return _is_at_least(cls.package, cls.oldest)

    @classmethod
    def can_serve_all(cls, spec: AttentionSpec) -> bool:
        # `flash_attn_varlen_func` splits keys only where query heads share them and nothing is added to the scores.
        return spec.num_heads > spec.num_kv_heads and spec.window is None and spec.alibi_slopes is None

    def prepare(self, sequences: Sequences) -> CountedKeys:
        batch = sequences.batch
        return CountedKeys(batch, torch.nn.functional.pad(batch.key_lens.cumsum(0, dtype=torch.int32), (1, 0)))

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.attend(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=plan.batch.query_starts,
            cu_seqlens_k=plan.key_starts,
            max_seqlen_q=plan.batch.max_query_len,
            max_seqlen_k=plan.batch.max_key_len,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self.window,
            softcap=self.softcap,
            alibi_slopes=self.features(None).alibi_slopes,
            block_table=plan.batch.block_tables,
        )
        return out


class TorchVarlen(FlashAttention2):
    """FlashAttention-2 as torch brings it along."""

    name = "torch's varlen_attn"
    package = "torch"
    function = ("torch.nn.attention.varlen", "varlen_attn")
    extras = frozenset(("window",))
    oldest = "2.13"  # the first with block tables

    @classmethod
    def can_serve_all(cls, spec: AttentionSpec) -> bool:
        return True  # torch's own call of the kernel splits keys wherever there is a block table

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, plan: Any, sinks: Tensor | None = None
    ) -> Tensor:
        out: Tensor = self.attend(
            query,
            key_cache,
            value_cache,
            plan.batch.query_starts,
            plan.key_starts,
            plan.batch.max_query_len,
            plan.batch.max_key_len,
            scale=self.spec.scale,
            window_size=(self.window[0], 0),  # here this alone makes it causal
            enable_gqa=self.spec.num_heads > self.spec.num_kv_heads,
            seqused_k=plan.batch.key_lens,
            block_table=plan.batch.block_tables,
        )
        return out


LIBRARIES: tuple[type[Library], ...] = (  # which is taken first
    FlashAttention3,
    FlashAttention3Forward,
    FlashAttention4,
    FlashAttention2,
    TorchVarlen,
)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; None for another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _is_at_least(package: str, version: str) -> bool:
    try:
        return bool(TorchVersion(metadata.version(package)) >= TorchVersion(version))
    except metadata.PackageNotFoundError:
        return False
