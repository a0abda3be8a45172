"""The C++ ops with the signatures of `kernels/eager.py`, which defines them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import PagedBatch
from ..eager import KINDS, PLAIN, Activation, AttentionFeatures, values_in_keys
from ..eager_moe import ExpertPlan, GroupedLinear, Routing
from .functions import DTYPES, Functions, address, function

_SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax of chosen": 2}


class CpuOps(Functions):
    """The ops for one dtype; each keeps what its C++ function needs to know for good.

    Inputs are on the CPU and of that dtype; what a function wants contiguous is asserted. Raises Unavailable.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        library = self._library
        self._add_rms_norm = function(library, "add_rms_norm", "i" + "p" * 5 + "nllll" + "ffi")
        self._add_layer_norm = function(library, "add_layer_norm", "i" + "p" * 6 + "nllll" + "fii")
        self._activation = function(library, "activation", "iii" + "pp" + "nlli")
        self._rotary_store_kv = function(library, "rotary_store_kv", "i" + "p" * 10 + "n" + "l" * 11 + "ii")
        self._store_kv = function(library, "store_kv", "i" + "p" * 5 + "n" + "l" * 7 + "i")
        self._route = function(library, "route", "ippppllliifllii")
        self._plan_experts = function(library, "plan_experts", "pppplll")
        self._grouped_linear = function(library, "grouped_linear", "i" + "p" * 6 + "lllli")
        self._panel: int = library.grouped_panel()
        self._step: int = library.grouped_step(self._dtype)
        self._combine = function(library, "combine", "ipppp" + "llli")
        self._counter_noise = function(library, "counter_noise", "ppp" + "llli")
        self._sample_shard = function(library, "sample_shard", "ippppp" + "lllli")
        self._likeliest = function(library, "likeliest", "ippppp" + "lllii")
        self._draw_filtered = function(library, "draw_filtered", "pppppp" + "lli")
        self._apply_bitmask = function(library, "apply_bitmask", "ppp" + "lllli")
        self._paged_attention = function(library, "paged_attention", "i" + "p" * 7 + "sb" + "l" * 6 + "fflppi")
        self.head_dim_multiple: int = library.head_dim_multiple()
        self.max_head_dim: int = library.max_head_dim()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        return self.add_rms_norm(x, None, weight, eps, offset)[0]

    def add_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, total, sizes = _norm_outputs(x, residual)
        self._add_rms_norm(
            self._dtype,
            x.data_ptr(),
            address(residual),
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
            address(residual),
            address(weight),
            address(bias),
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
        assert query.stride(2) == key.stride(2) == 1 and key_cache.is_contiguous()
        assert value is None or (value.stride(2) == 1 and value_cache.is_contiguous())
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
            key.shape[1],
            head_dim,
            value_cache.shape[3],
            cos.shape[1],
            *query.stride()[:2],
            *key.stride()[:2],
            *((0, 0) if value is None else value.stride()[:2]),
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
            address(sinks),
            address(slopes),
            self._threads,
        )
        return out

    def route(self, logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits: of any dtype of these ops."""
        assert logits.is_contiguous() and (correction is None or correction.dtype == torch.float32)
        num_tokens, num_experts = logits.shape
        weights = torch.empty(num_tokens, routing.top_k)
        ids = torch.empty(num_tokens, routing.top_k, dtype=torch.int32)
        self._route(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            None if correction is None else correction.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            num_tokens,
            num_experts,
            routing.top_k,
            _SCORINGS[routing.scoring],
            routing.normalise,
            routing.scale,
            routing.num_groups,
            routing.top_groups,
            routing.group_score == "sum of two",
            self._threads,
        )
        return weights, ids

    def plan_experts(self, ids: Tensor, first: int, num_local: int) -> ExpertPlan:
        assert ids.is_contiguous() and ids.dtype == torch.int32
        pairs, places = torch.empty_like(ids.view(-1)), torch.empty_like(ids)
        starts = torch.empty(num_local + 1, dtype=torch.int32)
        self._plan_experts(
            ids.data_ptr(), pairs.data_ptr(), starts.data_ptr(), places.data_ptr(), ids.numel(), first, num_local
        )
        return ExpertPlan(pairs, starts, places, int(starts[-1]))

    def bind_grouped_linear(self, weight: Tensor) -> GroupedLinear:
        """A copy of `weight` in the layout of grouped_linear.cpp, so that the caller can let the plain one go."""
        num_experts, size_out, size_in = weight.shape
        whole = F.pad(weight, (0, -size_in % self._step, 0, -size_out % self._panel))
        panels = whole.view(
            num_experts, -(-size_out // self._panel), self._panel, -(-size_in // self._step), self._step
        )
        packed = panels.transpose(2, 3).contiguous()

        def grouped_linear(x: Tensor, bias: Tensor | None, plan: ExpertPlan, by_token: bool) -> Tensor:
            assert x.is_contiguous() and x.shape[1] == size_in and (bias is None or bias.is_contiguous())
            out = torch.empty(plan.num_rows, size_out, dtype=x.dtype)
            self._grouped_linear(
                self._dtype,
                x.data_ptr(),
                packed.data_ptr(),
                None if bias is None else bias.data_ptr(),
                plan.pairs.data_ptr() if by_token else None,
                plan.starts.data_ptr(),
                out.data_ptr(),
                num_experts,
                size_in,
                size_out,
                plan.top_k,
                self._threads,
            )
            return out

        return grouped_linear

    def combine(self, rows: Tensor, weights: Tensor, plan: ExpertPlan) -> Tensor:
        assert rows.is_contiguous() and weights.is_contiguous() and weights.dtype == torch.float32
        num_tokens, top_k = weights.shape
        out = torch.empty(num_tokens, rows.shape[1], dtype=rows.dtype)
        self._combine(
            self._dtype,
            rows.data_ptr(),
            weights.data_ptr(),
            plan.places.data_ptr(),
            out.data_ptr(),
            num_tokens,
            top_k,
            rows.shape[1],
            self._threads,
        )
        return out

    def counter_noise(self, keys: Tensor, token_ids: Tensor) -> Tensor:
        assert keys.is_contiguous() and token_ids.is_contiguous() and token_ids.dtype == keys.dtype == torch.int32
        rows, n = len(keys), token_ids.shape[-1]
        out = torch.empty(rows, n)
        ids_row = n if token_ids.dim() == 2 else 0
        self._counter_noise(keys.data_ptr(), token_ids.data_ptr(), out.data_ptr(), rows, n, ids_row, self._threads)
        return out

    def sample_shard(self, logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
        assert logits.stride(1) == 1 and temperatures.is_contiguous() and keys.is_contiguous()
        assert temperatures.dtype == torch.float32 and keys.dtype == torch.int32
        rows, n = logits.shape
        values, token_ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._sample_shard(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            temperatures.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            token_ids.data_ptr(),
            rows,
            n,
            logits.stride(0),
            start,
            self._threads,
        )
        return values, token_ids

    def likeliest(
        self, logits: Tensor, temperatures: Tensor, count: int, with_mass: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert logits.is_contiguous() and temperatures.is_contiguous()
        assert temperatures.dtype == torch.float32
        rows, n = logits.shape
        values, places = torch.empty(rows, count), torch.empty(rows, count, dtype=torch.int64)
        limits = torch.empty(rows, 2, dtype=torch.float64)
        self._likeliest(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            temperatures.data_ptr(),
            values.data_ptr(),
            places.data_ptr(),
            limits.data_ptr(),
            rows,
            n,
            count,
            with_mass,
            self._threads,
        )
        return values, places, limits

    def draw_filtered(self, values: Tensor, token_ids: Tensor, limits: Tensor, filters: Tensor, keys: Tensor) -> Tensor:
        assert all(each.is_contiguous() for each in (values, token_ids, limits, filters, keys))
        assert values.dtype == torch.float32 and limits.dtype == filters.dtype == torch.float64
        assert token_ids.dtype == torch.int64 and keys.dtype == torch.int32
        rows, n = values.shape
        drawn = torch.empty(2, rows, dtype=torch.int64)
        self._draw_filtered(
            values.data_ptr(),
            token_ids.data_ptr(),
            limits.data_ptr(),
            filters.data_ptr(),
            keys.data_ptr(),
            drawn.data_ptr(),
            rows,
            n,
            self._threads,
        )
        return drawn

    def apply_bitmask(self, logits: Tensor, rows: Tensor | None, mask: Tensor, start: int) -> None:
        assert logits.is_contiguous() and mask.is_contiguous() and logits.dtype == torch.float32
        assert mask.dtype == torch.int32 and start + logits.shape[1] <= 32 * mask.shape[1]
        self._apply_bitmask(
            logits.data_ptr(),
            address(rows),
            mask.data_ptr(),
            *mask.shape,
            logits.shape[1],
            start,
            self._threads,
        )


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
