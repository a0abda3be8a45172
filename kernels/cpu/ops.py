"""The C++ ops with the signatures of `kernels/eager.py`, which defines them."""

from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from ..batch import PagedBatch
from ..eager import PLAIN, AttentionFeatures, values_in_keys
from .build import Unavailable, load_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_Function = Callable[..., None]


class CpuOps:
    """The ops for one dtype; each keeps what its C++ function needs to know for good.

    Inputs are on the CPU and of that dtype; what a function wants contiguous is asserted. Raises Unavailable.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise Unavailable(f"no C++ ops for {dtype}")
        self._dtype = DTYPES[dtype]
        self._threads = torch.get_num_threads()
        library = load_library()
        self._add_rms_norm = _function(library, "add_rms_norm", "i" + "p" * 5 + "llffi")
        self._silu_and_mul = _function(library, "silu_and_mul", "ipplli")
        self._rotary_store_kv = _function(library, "rotary_store_kv", "i" + "p" * 10 + "l" * 9 + "ii")
        self._paged_attention = _function(library, "paged_attention", "i" + "p" * 7 + "l" * 8 + "fflppi")
        self.head_dim_multiple: int = library.head_dim_multiple()
        self.max_head_dim: int = library.max_head_dim()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return self.add_rms_norm(x, None, weight, eps, offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        assert x.is_contiguous() and (residual is None or residual.is_contiguous())
        out = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        hidden = x.shape[-1]
        self._add_rms_norm(
            self._dtype,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            offset,
            self._threads,
        )
        return out, total

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, n, dtype=gate_up.dtype)
        self._silu_and_mul(self._dtype, gate_up.data_ptr(), out.data_ptr(), rows, n, self._threads)
        return out

    def rotary_store_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        interleaved: bool = False,
    ) -> Tensor:
        num_tokens, heads, head_dim = query.shape
        kv_heads = key.shape[1]
        value_dim = value_cache.shape[-1]
        assert query.stride()[1:] == key.stride()[1:] == (head_dim, 1) and key_cache.is_contiguous()
        if value is not None:
            assert value.stride()[1:] == (value_dim, 1) and value_cache.is_contiguous()
        out = torch.empty(num_tokens, heads, head_dim, dtype=query.dtype)
        self._rotary_store_kv(
            self._dtype,
            query.data_ptr(),
            key.data_ptr(),
            None if value is None else value.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            out.data_ptr(),
            num_tokens,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            cos.shape[1],
            query.stride(0),
            key.stride(0),
            0 if value is None else value.stride(0),
            interleaved,
            self._threads,
        )
        return out

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        scale: float,
        features: AttentionFeatures = PLAIN,
    ) -> Tensor:
        """query: [num_tokens, heads, head_dim], contiguous; head_dim and value_dim multiples of `head_dim_multiple`, up
        to `max_head_dim`."""
        assert query.is_contiguous() and key_cache.is_contiguous()
        assert value_cache.is_contiguous() or values_in_keys(key_cache, value_cache)
        _, block_size, kv_heads, head_dim = key_cache.shape
        num_tokens, heads, value_dim = *query.shape[:2], value_cache.shape[-1]
        out = torch.empty(num_tokens, heads, value_dim, dtype=query.dtype)
        num_seqs, max_blocks = batch.block_tables.shape
        sinks = None if features.sinks is None else features.sinks.float().contiguous()
        slopes = None if features.alibi_slopes is None else features.alibi_slopes.float().contiguous()
        self._paged_attention(
            self._dtype,
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.key_lens.data_ptr(),
            num_seqs,
            max_blocks,
            heads,
            kv_heads,
            head_dim,
            value_dim,
            value_cache.stride(1),
            block_size,
            scale,
            features.softcap or 0.0,
            features.window or 0,
            None if sinks is None else sinks.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            self._threads,
        )
        return out


def _function(library: CDLL, name: str, signature: str) -> _Function:
    """signature: a letter an argument: i int, l long, f float, p pointer."""
    function = getattr(library, name)
    function.argtypes = [{"i": c_int, "l": c_long, "f": c_float, "p": c_void_p}[letter] for letter in signature]
    function.restype = None
    return function
