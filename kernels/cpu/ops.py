"""The C++ ops with the signatures of `kernels/eager.py`, which defines them."""

from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_long, c_void_p
from functools import partial

import torch
from torch import Tensor

from ..batch import PagedBatch
from ..eager import KINDS, PLAIN, Activation, AttentionFeatures
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
        self._add_rms_norm = _function(library, "add_rms_norm", "i" + "p" * 5 + "l" * 5 + "ffi")
        self._add_layer_norm = _function(library, "add_layer_norm", "i" + "p" * 6 + "l" * 5 + "fii")
        self._activation = _function(library, "activation", "iii" + "pp" + "llli")
        self._rotary_store_kv = _function(library, "rotary_store_kv", "i" + "p" * 10 + "l" * 12 + "ii")
        self._store_kv = _function(library, "store_kv", "i" + "p" * 5 + "l" * 8 + "i")
        self._paged_attention = _function(library, "paged_attention", "i" + "p" * 7 + "l" * 6 + "fflppi")
        self.head_dim_multiple: int = library.head_dim_multiple()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return self.add_rms_norm(x, None, weight, eps, offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, total, sizes = _norm_outputs(x, residual)
        self._add_rms_norm(
            self._dtype,
            x.data_ptr(),
            _address(residual),
            weight.data_ptr(),
            out.data_ptr(),
            total.data_ptr(),
            *sizes,
            eps,
            offset,
            self._threads,
        )
        return out, total

    def add_layer_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total, sizes = _norm_outputs(x, residual)
        self._add_layer_norm(
            self._dtype,
            x.data_ptr(),
            _address(residual),
            _address(weight),
            _address(bias),
            out.data_ptr(),
            total.data_ptr(),
            *sizes,
            eps,
            weight is not None and weight.dim() == 2,
            self._threads,
        )
        return out, total

    def head_layer_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        assert weight.shape == x.shape[1:] and weight.is_contiguous()
        return self.add_layer_norm(x, None, weight, None, eps)[0]

    def activation(self, kind: str) -> Activation:
        return partial(self._activate, KINDS.index(kind), False)

    def gated_activation(self, kind: str) -> Activation:
        return partial(self._activate, KINDS.index(kind), True)

    def _activate(self, kind: int, gated: bool, x: Tensor) -> Tensor:
        rows, n = x.shape
        stride, step = x.stride()
        assert step == 1
        if gated:
            n //= 2
        out = torch.empty(rows, n, dtype=x.dtype)
        self._activation(self._dtype, kind, gated, x.data_ptr(), out.data_ptr(), rows, n, stride, self._threads)
        return out

    def rotary_store_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        interleaved: bool = False,
    ) -> Tensor:
        num_tokens, heads, head_dim = query.shape
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1
        assert key_cache.is_contiguous() and value_cache.is_contiguous()
        out = torch.empty(num_tokens, heads, head_dim, dtype=query.dtype)
        self._rotary_store_kv(
            self._dtype,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            out.data_ptr(),
            num_tokens,
            heads,
            key.shape[1],
            head_dim,
            value.shape[2],
            cos.shape[1],
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            interleaved,
            self._threads,
        )
        return out

    def store_kv(self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        assert key.stride(2) == value.stride(2) == 1
        assert key_cache.is_contiguous() and value_cache.is_contiguous()
        self._store_kv(
            self._dtype,
            key.data_ptr(),
            value.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            *key.shape,
            value.shape[2],
            *key.stride()[:2],
            *value.stride()[:2],
            self._threads,
        )

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        scale: float,
        features: AttentionFeatures = PLAIN,
    ) -> Tensor:
        """query: [num_tokens, heads, head_dim], contiguous; head_dim a multiple of `head_dim_multiple`, up to 256."""
        assert query.is_contiguous() and key_cache.is_contiguous() and value_cache.is_contiguous()
        _, block_size, kv_heads, head_dim = key_cache.shape
        out = torch.empty_like(query)
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
            query.shape[1],
            kv_heads,
            head_dim,
            block_size,
            scale,
            features.softcap or 0.0,
            features.window or 0,
            _address(sinks),
            _address(slopes),
            self._threads,
        )
        return out


def _norm_outputs(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A norm's outputs for x [num_tokens, hidden] or [num_tokens, heads, hidden], and outer, inner, hidden, strides."""
    if x.dim() == 2:
        (outer, hidden), (stride, step) = x.shape, x.stride()
        sizes = (outer, 1, hidden, stride, 0)
    else:
        *strides, step = x.stride()
        sizes = (*x.shape, *strides)
    assert step == 1 and (residual is None or residual.is_contiguous())
    out = torch.empty_like(x) if x.is_contiguous() else torch.empty(*x.shape, dtype=x.dtype)
    return out, x if residual is None else torch.empty_like(out), sizes


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _function(library: CDLL, name: str, signature: str) -> _Function:
    """signature: a letter an argument: i int, l long, f float, p pointer."""
    function = getattr(library, name)
    function.argtypes = [{"i": c_int, "l": c_long, "f": c_float, "p": c_void_p}[letter] for letter in signature]
    function.restype = None
    return function
