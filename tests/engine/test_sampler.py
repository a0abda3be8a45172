"""The sampler over simulated vocabulary shards: one thread a rank, against transformers and exact probabilities."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from meshlm.engine.noise import Noise
from meshlm.engine.sampler import Sampler
from meshlm.engine.staging import Staging
from meshlm.engine.step import SampleRequest, SampleSettings
from meshlm.kernels import eager_sample, select_ops
from meshlm.shardformer.shard import Range, even_split
from shards import on_ranks, splits

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
OPS = select_ops(CPU, torch.float32)
NEVER = float("-inf")


def draw(
    logits: Tensor, samples: Sequence[SampleRequest], shards: Sequence[Range] | None = None, noise: Any = None
) -> list[int]:
    """Token ids drawn by every rank of a tp group that holds `shards` of the vocabulary."""
    shards = shards or [(0, logits.shape[1])]
    ops = OPS
    if noise is not None:
        filtered = partial(eager_sample.draw_filtered, noise=noise)
        ops = replace(OPS, sample_shard=partial(sample_shard, noise), draw_filtered=filtered)

    def rank(tp: Any) -> list[int]:
        start, stop = shards[tp.rank]
        sampler = Sampler(tp, shards, ops, CPU)
        draws = sampler.plan(samples)
        staged = Staging(CPU).open(draws.shapes)
        draws.write(staged.host)
        result = sampler(logits[:, start:stop].clone(), draws, staged.send().arrays)
        assert (result.complete is None) == (
            not draws.settings.filtered or draws.settings.num_candidates == sampler.largest_shard
        )
        complete = [True] if result.complete is None else result.complete.tolist()
        token_ids: list[int] = (result.token_ids if all(complete) else sampler.redraw(result, complete)).tolist()
        return token_ids

    drawn = on_ranks(len(shards), rank)
    assert all(result == drawn[0] for result in drawn), "ranks disagree"
    return drawn[0]


def sample_shard(noise: Any, logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The op with another noise; every row's temperature is 1."""
    assert (temperatures == 1).all()
    scores = logits + noise(keys, torch.arange(start, start + logits.shape[1], dtype=torch.int32))
    return scores.max(dim=-1).values, scores.argmax(dim=-1) + start


def request(row: int = 0, temperature: float = 0.0, **values: Any) -> SampleRequest:
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    position = values.pop("position", row)
    return SampleRequest(row, position, SampleSettings(temperature=temperature, **{**defaults, **values}))


# ---- greedy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [3, 7, 1000])
def test_greedy_is_the_argmax_on_any_shards(vocab_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, vocab_size)
    for shards in splits(vocab_size):
        assert draw(logits, [request(r) for r in range(50)], shards) == logits.argmax(-1).tolist()


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(4, 9)
    logits[1, [2, 7]] = 5
    logits[2, [5, 6]] = 5
    logits[3, 8] = 1
    for shards in splits(9):
        assert draw(logits, [request(r) for r in range(4)], shards) == [0, 2, 5, 8]


def test_large_ids_are_exact() -> None:
    logits = torch.zeros(1, 200_003)
    logits[0, 200_001] = 1
    assert draw(logits, [request()], even_split(200_003, 3)) == [200_001]
    assert draw(logits * 100, [request(temperature=1.0, top_k=5)], even_split(200_003, 3)) == [200_001]


@pytest.mark.parametrize("values", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.9}], ids=str)
def test_forced_ids_are_drawn_in_their_rows_alone(values: dict[str, Any]) -> None:
    logits = torch.randn(200, 8)
    for shards in splits(8):
        free = draw(logits, [request(r, **values) for r in range(200)], shards)
        forced = draw(logits, [request(r, forced=r % 8 if r % 2 else -1, **values) for r in range(200)], shards)
        assert forced == [r % 8 if r % 2 else free[r] for r in range(200)]


# ---- which tokens remain --------------------------------------------------------------------------------------------


def favour(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise with which row r of `count` draws token r, if it may be drawn at all."""
    noise = Noise(np.zeros(count, np.uint64), range(count), 1)
    host = {name: np.empty(shape, np.int32) for name, (_, shape) in noise.shapes.items()}
    noise.write(host)
    words = torch.from_numpy(host["keys"][0, :count, 0])  # by which a row is known, wherever it is drawn
    assert len(words.unique()) == count
    return lambda keys, token_ids: (words[token_ids.long()] == keys[:, :1]).float() * 1e6


def kept(logits: Tensor, shards: Sequence[Range] | None = None, **values: Any) -> set[int]:
    """The tokens of one row of logits that can be drawn, each tried."""
    vocab_size = len(logits)
    samples = [request(r, **values) for r in range(vocab_size)]
    drawn = draw(logits.expand(vocab_size, -1), samples, shards, noise=favour(vocab_size))
    return {token for row, token in enumerate(drawn) if row == token}


def kept_by_transformers(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> set[int]:
    warpers: list[Callable[..., Any]] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    scores = logits.double().unsqueeze(0)
    for warper in warpers:
        scores = warper(None, scores)
    return set(torch.isfinite(scores[0]).nonzero().flatten().tolist())


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 127},
    {"top_k": 128},
    {"top_k": 300},
    {"top_k": 10**9},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.5},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-4},
    {"top_k": 200, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.2},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 400, "top_p": 0.9, "min_p": 0.02},
]
SPREADS = {"peaked": 4.0, "ordinary": 1.0, "flat": 0.05}


@pytest.mark.parametrize(
    "spread", [spread if spread == "ordinary" else pytest.param(spread, marks=pytest.mark.slow) for spread in SPREADS]
)
@pytest.mark.parametrize("values", FILTERS, ids=str)
def test_the_kept_set_is_that_of_transformers(values: dict[str, Any], spread: str) -> None:
    torch.manual_seed(3)
    logits = torch.randn(700) * SPREADS[spread]
    for temperature in (1.0, 0.7):
        expected = kept_by_transformers(logits, temperature, **values)
        for parts in (1, 3):
            assert kept(logits, even_split(700, parts), temperature=temperature, **values) == expected


def test_flat_distributions_need_more_than_the_first_candidates() -> None:
    """Guards the test above."""
    torch.manual_seed(3)
    logits = torch.randn(700) * SPREADS["flat"]
    assert len(kept_by_transformers(logits, 1.0, top_p=0.9)) > 4 * 128


@pytest.mark.parametrize("vocab_size", [2, 3, 5, 40, 127, 129])
@pytest.mark.parametrize("values", [{"top_k": 2}, {"top_k": 500}, {"top_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_vocabularies_smaller_than_the_candidates(values: dict[str, Any], vocab_size: int) -> None:
    torch.manual_seed(4)
    logits = torch.randn(vocab_size)
    expected = kept_by_transformers(logits, 1.0, **values)
    for shards in splits(vocab_size):
        if all(stop > start for start, stop in shards):
            assert kept(logits, shards, temperature=1.0, **values) == expected


def test_all_that_tie_with_the_kth_are_kept() -> None:
    logits = torch.cat((torch.full((3,), 2.0), torch.ones(400), torch.zeros(100)))[torch.randperm(503)]
    for values in ({"top_k": 5}, {"top_k": 5, "min_p": 0.2}, {"top_k": 3}, {"top_k": 2}, {"top_k": 404}):
        expected = kept_by_transformers(logits, 1.0, **values)
        for parts in (1, 2, 3):
            assert kept(logits, even_split(503, parts), temperature=1.0, **values) == expected


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9])
def test_ties_with_the_kth_count_in_the_mass_for_top_p(top_p: float) -> None:
    """Which of equals top-p keeps is nobody's business, how many is."""
    logits = torch.zeros(601)
    logits[300] = 6.0
    expected = kept_by_transformers(logits, 1.0, top_k=200, top_p=top_p)
    for parts in (1, 2):
        ours = kept(logits, even_split(601, parts), temperature=1.0, top_k=200, top_p=top_p)
        assert abs(len(ours) - len(expected)) <= 1
        assert 300 in ours


def test_equal_logits() -> None:
    logits = torch.zeros(600)
    assert len(kept(logits, even_split(600, 2), temperature=1.0, top_p=0.5)) in (300, 301)
    assert kept(logits, even_split(600, 2), temperature=1.0, min_p=1.0) == set(range(600))


def test_impossible_tokens_stay_so() -> None:
    logits = torch.full((300,), NEVER)
    logits[[4, 250]] = torch.tensor([1.0, 2.0])
    for values in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 1e-9}, {"top_k": 2, "top_p": 0.999}):
        for parts in (1, 2, 3):
            assert kept(logits, even_split(300, parts), temperature=1.0, **values) == {4, 250}


# ---- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 0.5, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.15},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_draws_have_the_exact_probabilities(values: dict[str, Any]) -> None:
    """Chi-square; the bound is that of p = 1e-4 for as many degrees of freedom as there are tokens, at most 8."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, -2.5, 1.6, 0.9])
    count = 30_000
    samples = [request(r, seed=17 + r // 100, position=r % 100, **values) for r in range(count)]
    drawn = draw(logits.expand(count, -1), samples, [(0, 3), (3, 4), (4, 8)])
    seen = torch.bincount(torch.tensor(drawn), minlength=8).double()
    filters = {name: value for name, value in values.items() if name != "temperature"}
    allowed = kept_by_transformers(logits, values["temperature"], **filters)
    masked = torch.tensor([float(x) if i in allowed else NEVER for i, x in enumerate(logits)], dtype=torch.float64)
    expected = torch.softmax(masked / values["temperature"], -1) * count
    assert set(drawn) == allowed
    live = expected > 0
    assert ((seen - expected)[live] ** 2 / expected[live]).sum().item() < 31.9


def mixed(count: int) -> list[SampleRequest]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.2, "min_p": 0.01, "top_k": 400},
        {"temperature": 3.0, "forced": 3},
    ]
    return [request(r, seed=r % 7, **kinds[r % len(kinds)]) for r in range(count)]


def test_the_same_ids_on_any_shards() -> None:
    torch.manual_seed(5)
    logits, samples = torch.randn(120, 997) * 2, mixed(120)
    alone = draw(logits, samples)
    assert len(set(alone)) > 60
    for shards in splits(997):
        assert draw(logits, samples, shards) == alone


def test_a_draw_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(6)
    logits, samples = torch.randn(30, 611), mixed(30)
    together = draw(logits, samples)
    assert [draw(logits[r : r + 1], [samples[r]])[0] for r in range(30)] == together
    order = torch.randperm(30).tolist()
    assert draw(logits[order], [samples[r] for r in order]) == [together[r] for r in order]


def test_filters_that_filter_nothing_change_no_draw() -> None:
    torch.manual_seed(7)
    logits = torch.randn(60, 300)
    plain = draw(logits, [request(r, temperature=1.0) for r in range(60)])
    for values in ({"top_k": 300}, {"min_p": 1e-30}, {"top_p": 1 - 1e-16}):
        assert draw(logits, [request(r, temperature=1.0, **values) for r in range(60)]) == plain


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 5e-324])
@pytest.mark.parametrize("values", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_as_the_temperature_falls_draws_become_greedy(temperature: float, values: dict[str, Any]) -> None:
    torch.manual_seed(8)
    logits = torch.randn(20, 50).mul(8).round()
    logits[torch.arange(20), torch.arange(20)] = 40.0
    for shards in splits(50):
        drawn = draw(logits, [request(r, temperature=temperature, **values) for r in range(20)], shards)
        assert drawn == list(range(20))
