"""Rows of a vocabulary shard; a token of another shard gives zeros, so that the shards' sum is the whole look-up.

Definition: `eager.embedding`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import power_of_two

_MAX_BLOCK = 1024


@triton.jit
def _embedding_kernel(
    token_ids: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    start: tl.tensor,
    weight_stride: tl.tensor,
    LOCAL_VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(token_ids + token).to(tl.int64) - start
    ours = (local >= 0) & (local < LOCAL_VOCAB)
    row = tl.load(weight + local * weight_stride + cols, mask=ours & (cols < HIDDEN), other=0.0)
    tl.store(out + token * HIDDEN + cols, row, mask=cols < HIDDEN)


def embedding(token_ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """`eager.embedding`. token_ids: [num_tokens], contiguous; weight: [local_vocab, hidden], a row side by side."""
    assert token_ids.is_contiguous() and weight.stride(1) == 1
    num_tokens, hidden = len(token_ids), weight.shape[1]
    out = torch.empty((num_tokens, hidden), dtype=weight.dtype, device=weight.device)
    if out.numel():
        block = min(power_of_two(hidden), _MAX_BLOCK)
        _embedding_kernel[(num_tokens, -(-hidden // block))](
            token_ids,
            weight,
            out,
            start,
            weight.stride(0),
            LOCAL_VOCAB=len(weight),
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return out
