"""A step's plain numbers as arrays, and what attention is told of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.batch import PagedBatch
from ..shardformer.backends import Sequences
from .staging import Shapes
from .step import StepInput, drawn_before


def token_shapes(num_tokens: int, num_seqs: int) -> Shapes:
    """The arrays that come first, and that alone fix where each of them lies."""
    return {
        "token_ids": (torch.int64, (num_tokens,)),
        "positions": (torch.int64, (num_tokens,)),
        "slots": (torch.int64, (num_tokens,)),
        "key_lens": (torch.int32, (num_seqs,)),
    }


def step_shapes(step: StepInput, padding: int = 0) -> Shapes:
    """The arrays of a step's forward. padding: sequences of one token and no keys behind its own."""
    num_seqs = len(step.query_lens) + padding
    return {
        **token_shapes(step.num_tokens + padding, num_seqs),
        "query_starts": (torch.int32, (num_seqs + 1,)),
        "block_tables": (torch.int32, (num_seqs, max(map(len, step.block_tables)))),
    }


def copy_shapes(step: StepInput) -> Shapes:
    """Of the blocks that are copied before it."""
    return {"copies": (torch.int64, (2, len(step.copies)))} if step.copies else {}


def write_step(step: StepInput, block_size: int, host: Mapping[str, Any]) -> None:
    """Fills what `step_shapes` has made room for; padding is stored nowhere and attends to nothing."""
    num_tokens, num_seqs = step.num_tokens, len(step.query_lens)
    query_lens, contexts = np.array(step.query_lens), np.array(step.context_lens)

    tables = host["block_tables"]
    tables[:] = 0
    widths = np.array([len(table) for table in step.block_tables])
    filled = np.arange(tables.shape[1]) < widths[:, None]
    tables[:num_seqs][filled] = np.frombuffer(b"".join(step.block_tables), np.int32)

    starts = host["query_starts"]
    starts[0] = 0
    np.cumsum(query_lens, out=starts[1 : num_seqs + 1])
    starts[num_seqs + 1 :] = np.arange(num_tokens + 1, num_tokens + len(starts) - num_seqs)
    host["key_lens"][:num_seqs] = contexts + query_lens
    host["key_lens"][num_seqs:] = 0

    sequence = np.repeat(np.arange(num_seqs), query_lens)  # of each token
    positions = np.arange(num_tokens) + (contexts - starts[:num_seqs])[sequence]
    blocks = tables[sequence, positions // block_size].astype(np.int64)
    for name, values, padding in (
        ("token_ids", np.frombuffer(step.token_ids, np.int64), 0),
        ("positions", positions, 0),
        ("slots", blocks * block_size + positions % block_size, -1),
    ):
        host[name][:num_tokens] = values
        host[name][num_tokens:] = padding


def known_tokens(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """A step's token ids, with those that the step drew which it is ahead of."""
    return torch.where(token_ids < 0, drawn.index_select(0, drawn_before(token_ids).clamp_(min=0)), token_ids)


def sequences_of(step: StepInput, block_size: int, arrays: Mapping[str, Tensor]) -> Sequences:
    """The step's sequences, with the arrays that have come to the device; without padding."""
    key_lens = [context + count for context, count in zip(step.context_lens, step.query_lens, strict=True)]
    batch = PagedBatch(
        block_tables=arrays["block_tables"],
        query_starts=arrays["query_starts"],
        key_lens=arrays["key_lens"],
        max_query_len=max(step.query_lens),
        max_key_len=max(key_lens),
        min_query_len=min(step.query_lens),
        num_keys=sum(key_lens),
    )
    return Sequences(step.query_lens, key_lens, step.block_tables, block_size, batch)
