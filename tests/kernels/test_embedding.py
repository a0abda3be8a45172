"""`kernels/embedding.py` against its definition: bit for bit, being a copy."""

import pytest
import torch

from meshlm.kernels import eager

kernel = pytest.importorskip("meshlm.kernels.embedding")


@pytest.mark.parametrize("shards", [[(0, 11)], [(0, 6), (6, 11)], [(0, 1), (1, 2), (2, 11)]])
@pytest.mark.parametrize("hidden", [1, 5, 576, 1030])
def test_embedding(hidden: int, shards: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, hidden + 3, device=device).to(dtype)[:, :hidden]
    weight[3] = float("inf")  # another's row must not turn into NaN on the way
    token_ids = torch.tensor([0, 10, 5, 6, 6, 1, 2, 3], device=device)
    parts = [kernel.embedding(token_ids, weight[start:stop], start) for start, stop in shards]
    for (start, stop), part in zip(shards, parts, strict=True):
        assert torch.equal(part, eager.embedding(token_ids, weight[start:stop], start))
    assert torch.equal(sum(parts[1:], parts[0]), weight[token_ids])
    assert kernel.embedding(token_ids[:0], weight, 0).shape == (0, hidden)


def test_a_token_far_outside_is_not_read(device: torch.device) -> None:
    token_ids = torch.tensor([2**31 - 1, 2**40, 0], device=device)
    weight = torch.ones(4, 8, device=device)
    assert not kernel.embedding(token_ids, weight, 2**20).any()


@pytest.mark.cuda
def test_embedding_of_a_real_size(dtype: torch.dtype, device: torch.device) -> None:
    weight = torch.randn(65536, 4096, device=device).to(dtype)
    token_ids = torch.randint(0, 131072, (4096,), device=device)
    assert torch.equal(kernel.embedding(token_ids, weight, 65536), eager.embedding(token_ids, weight, 65536))
