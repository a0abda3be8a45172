"""Bans the tokens of a vocabulary shard whose bit is not set in their row's mask.

Definition: `eager_sample.apply_bitmask`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # tokens of a program


@triton.jit
def _bitmask_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    start: tl.tensor,
    LOCAL_VOCAB: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number) if HAS_ROWS else number
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = start + at
    word = tl.load(mask + number * words + token // 32, mask=at < LOCAL_VOCAB, other=-1)
    banned = (word >> (token % 32) & 1) == 0
    tl.store(logits + row * LOCAL_VOCAB + at, float("-inf"), mask=banned & (at < LOCAL_VOCAB))


def apply_bitmask(logits: Tensor, rows: Tensor | None, mask: Tensor, start: int) -> None:
    """`eager_sample.apply_bitmask`."""
    num_masks, words = mask.shape
    local_vocab = logits.shape[1]
    assert logits.dtype == torch.float32 and logits.is_contiguous() and start + local_vocab <= 32 * words
    assert mask.dtype == torch.int32 and mask.is_contiguous() and (rows is None or rows.shape == (num_masks,))
    if num_masks and local_vocab:
        _bitmask_kernel[(num_masks, -(-local_vocab // _BLOCK))](
            logits,
            rows if rows is not None else mask,
            mask,
            words,
            start,
            LOCAL_VOCAB=local_vocab,
            HAS_ROWS=rows is not None,
            BLOCK=_BLOCK,
            num_warps=4,
        )
