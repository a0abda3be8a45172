"""What a paged-attention kernel knows of a step, as tensors: made once, read by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one step. Sequence i's queries are rows ``query_starts[i] : query_starts[i + 1]``; they are its
    last tokens, so that query j of m stands at position ``key_lens[i] - m + j``.

        key_lens[i] = 7, block_size = 4, 3 queries     keys   [ b0: 0 1 2 3 | b1: 4 5 6 . ]
                                                       queries              4 5 6
    """

    block_tables: Tensor  # [num_seqs, max_blocks] int32: block ids, 0 past a sequence's last
    query_starts: Tensor  # [num_seqs + 1] int32
    key_lens: Tensor  # [num_seqs] int32: keys of each sequence, those of its queries included
    max_query_len: int
    max_key_len: int
    min_query_len: int
    num_keys: int  # of all sequences together

    @classmethod
    def of(
        cls,
        query_lens: Sequence[int],
        key_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
    ) -> "PagedBatch":
        """From plain numbers, one entry a sequence; a block table may be longer than its keys need."""
        counts = [-(-length // block_size) for length in key_lens]
        table = np.zeros((len(counts), max(counts, default=0)), dtype=np.int32)
        for row, count, blocks in zip(table, counts, block_tables, strict=True):
            row[:count] = blocks[:count]
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(query_lens, out=starts[1:])
        return cls(
            block_tables=to_device(torch.from_numpy(table), device),
            query_starts=to_device(torch.from_numpy(starts), device),
            key_lens=to_device(torch.tensor(key_lens, dtype=torch.int32), device),
            max_query_len=max(query_lens, default=0),
            max_key_len=max(key_lens, default=0),
            min_query_len=min(query_lens, default=0),
            num_keys=sum(key_lens),
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for what the device does."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
