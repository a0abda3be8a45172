"""Log-probabilities over simulated vocabulary shards: one thread a rank, against a sort of the whole row."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshlm.engine import logprobs
from meshlm.engine.logprobs import Logprobs
from meshlm.shardformer.shard import Range
from shards import on_ranks, splits

pytestmark = pytest.mark.usefixtures("one_thread")

NEVER = float("-inf")


def computed(logits: Tensor, targets: Tensor, top: int, shards: Sequence[Range] | None = None) -> Tensor:
    """What every rank of a tp group gets that holds `shards` of the vocabulary."""
    shards = shards or [(0, logits.shape[1])]

    def rank(tp: Any) -> Tensor:
        start, stop = shards[tp.rank]
        local = logits[:, start:stop].clone()
        numbers = Logprobs(tp, shards)(local, targets, top)
        assert torch.equal(local, logits[:, start:stop]), "logits stay as they are"
        return numbers

    first, *others = on_ranks(len(shards), rank)
    assert all(torch.equal(first, other) for other in others), "ranks disagree"
    return first


def check(numbers: Tensor, logits: Tensor, targets: Tensor, top: int) -> None:
    """Against a stable sort of whole rows, in float64."""
    num_rows, top = len(logits), min(top, logits.shape[1])
    expected = logits.double().log_softmax(dim=-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top]
    target = logits.gather(1, targets.unsqueeze(1))
    assert numbers.shape == (num_rows, 2 + 2 * top) and numbers.dtype == torch.float64
    torch.testing.assert_close(numbers[:, 0], expected.gather(1, targets.unsqueeze(1)).squeeze(1), atol=5e-7, rtol=0)
    assert numbers[:, 1].tolist() == (1 + (logits > target).sum(dim=1)).tolist()
    assert numbers[:, 2 : 2 + top].long().tolist() == order.tolist()
    torch.testing.assert_close(numbers[:, 2 + top :], expected.gather(1, order), atol=5e-7, rtol=0)


@pytest.mark.parametrize("vocab", [7, 128, 300, 1000])
@pytest.mark.parametrize("top", [0, 1, 5, 40, 10**6])
def test_on_any_shards(vocab: int, top: int) -> None:
    random = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9, vocab, generator=random) * 4
    targets = torch.randint(vocab, (9,), generator=random)
    for shards in splits(vocab):
        check(computed(logits, targets, top, shards), logits, targets, top)


VALUES = st.sampled_from([-1e30, -3.0, -0.0, 0.0, 1e-40, 1.0, 1.0, 2.5, NEVER])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([5, 130, 391]), st.integers(0, 12))
def test_of_equals_the_lowest_id_comes_first(data: st.DataObject, vocab: int, top: int) -> None:
    some = data.draw(st.lists(VALUES, min_size=4, max_size=12))
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    logits = torch.tensor(some).repeat(-(-vocab // len(some)))[:vocab][order].unsqueeze(0)
    logits[0, 0] = 1.0  # not all are impossible
    targets = torch.tensor([data.draw(st.integers(0, vocab - 1))])
    check(computed(logits, targets, top, data.draw(st.sampled_from(splits(vocab)))), logits, targets, top)


def test_large_logits_and_large_ids() -> None:
    logits = torch.full((1, 200_003), 3e4)
    logits[0, [200_001, 77]] = torch.tensor([3.1e4, 3.1e4])
    targets = torch.tensor([200_001])
    for shards in splits(200_003)[::2]:
        check(computed(logits, targets, 3, shards), logits, targets, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_the_same_alone_and_in_a_batch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads sum; one_thread sets back how many there are."""
    torch.set_num_threads(threads)
    logits = torch.randn(8, 70_000, generator=torch.Generator().manual_seed(5)) * 3
    targets = logits.argmax(dim=-1)
    together = computed(logits, targets, 5)
    for row in range(8):
        assert torch.equal(computed(logits[row : row + 1], targets[row : row + 1], 5)[0], together[row])
    monkeypatch.setattr(logprobs, "_LOGITS_AT_ONCE", 3 * 70_000)
    assert torch.equal(computed(logits, targets, 5), together)


def test_of_hidden_states_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_HIDDEN_AT_ONCE", 4)
    random = torch.Generator().manual_seed(6)
    hidden, head = torch.randn(11, 8, generator=random), torch.randn(8, 50, generator=random)
    targets, sizes = torch.randint(50, (11,), generator=random), []

    def logits(rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return rows @ head

    found = on_ranks(1, lambda tp: Logprobs(tp, [(0, 50)]).of_hidden(hidden, logits, targets, 3))[0]
    assert sizes == [4, 4, 3]
    check(found, hidden @ head, targets, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_hidden_states_whose_logits_are_rounded(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(6)
    hidden, head = torch.randn(11, 8, generator=random), torch.randn(8, 50, generator=random)
    targets = torch.randint(50, (11,), generator=random)
    found = on_ranks(
        1, lambda tp: Logprobs(tp, [(0, 50)]).of_hidden(hidden, lambda rows: (rows @ head).to(dtype), targets, 3)
    )[0]
    wide = on_ranks(
        1,
        lambda tp: Logprobs(tp, [(0, 50)]).of_hidden(hidden, lambda rows: (rows @ head).to(dtype).float(), targets, 3),
    )[0]
    assert torch.equal(found, wide)
