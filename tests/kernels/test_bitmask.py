"""`kernels/bitmask.py` and `kernels/cpu/sample.cpp` against their definition, and that against single bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from meshlm.kernels import eager_sample

NEVER = float("-inf")


@pytest.fixture(params=["eager", "triton", "C++"])
def kernel(request: pytest.FixtureRequest, compiled: Callable[[str, str], Any]) -> Any:
    """`apply_bitmask`."""
    return eager_sample if request.param == "eager" else compiled(request.param, "bitmask")


@pytest.mark.parametrize("rows", [None, [2, 0], []], ids=str)
@pytest.mark.parametrize(
    ("start", "stop", "vocab"),
    [(0, 101, 101), (0, 51, 101), (51, 101, 101), (40, 72, 101), (37, 43, 101), (64, 101, 101), (1024, 3000, 3008)],
)
def test_on_a_shard_of_the_vocabulary(
    kernel: Any, rows: list[int] | None, start: int, stop: int, vocab: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, stop - start)
    logits[0, 0], logits[2, -1] = NEVER, float("inf")
    bits = torch.rand(3 if rows is None else len(rows), -(-vocab // 32) * 32) < 0.5
    bits[:1, 32:64], bits[1:2, 32:96] = True, False  # whole words
    words = np.packbits(bits.numpy(), axis=1, bitorder="little").view(np.int32)
    expected = logits.clone()
    for index, row in enumerate(range(3) if rows is None else rows):
        expected[row] = expected[row].masked_fill(~bits[index, start:stop], NEVER)
    ours = logits.to(device)
    of = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device)
    kernel.apply_bitmask(ours, of, torch.from_numpy(words).to(device), start)
    assert torch.equal(ours.cpu(), expected)
