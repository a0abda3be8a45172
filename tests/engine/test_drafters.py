"""Drafters on exact tokens and on drawn ones, and how much is drafted against simulated acceptance."""

import itertools
import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.config import SpeculativeConfig
from meshlm.engine.sequence import Sequence
from meshlm.engine.speculation import (
    Drafter,
    DraftLength,
    FixedDraftLength,
    StepCost,
    create_draft_length,
    create_drafter,
)
from meshlm.engine.speculation.adaptive import best_length
from meshlm.engine.speculation.ngram import NGramDrafter
from meshlm.engine.speculation.occurrences import Occurrences
from meshlm.engine.speculation.speculator import create_speculator
from meshlm.engine.speculation.suffix import FinishedOutputs, SuffixDrafter

CONFIGS = {
    "ngram": SpeculativeConfig(method="ngram", prompt_lookup_min=1, prompt_lookup_max=3),
    "suffix": SpeculativeConfig(method="suffix", suffix_max_cached_tokens=24),
}
few_tokens = st.lists(st.integers(0, 3), max_size=40)
either = pytest.mark.parametrize("method", CONFIGS)


def propose(drafter: Drafter, tokens: list[int], max_tokens: int = 5) -> list[int]:
    drafter.begin("asked", tokens)
    try:
        return drafter.propose("asked", max_tokens)
    finally:
        drafter.end("asked", finished=False)


def finish(drafter: Drafter, prompt: list[int], output: list[int], finished: bool = True) -> None:
    drafter.begin("other", prompt)
    drafter.extend("other", output)
    drafter.end("other", finished)


def continuations(text: list[int], context: list[int], draft: list[int]) -> Iterator[int]:
    """Places in the text where `context` stood and `draft` followed; past the text's end, the draft goes on itself."""
    whole = text + draft
    for index in range(len(context), len(text)):
        if text[index - len(context) : index] == context and whole[index : index + len(draft)] == draft:
            yield index


# ---- both drafters --------------------------------------------------------------------------------------------------


@either
@given(outputs=st.lists(few_tokens, max_size=3), tokens=few_tokens, max_tokens=st.integers(0, 6))
def test_a_proposal_followed_the_last_tokens_before(
    method: str, outputs: list[list[int]], tokens: list[int], max_tokens: int
) -> None:
    drafter = create_drafter(CONFIGS[method])
    for output in outputs:
        finish(drafter, [7, 7], output)
    draft = propose(drafter, tokens, max_tokens)
    assert len(draft) <= max_tokens
    texts = [tokens, *outputs] if method == "suffix" else [tokens]
    assert not draft or any(any(continuations(text, tokens[-1:], draft)) for text in texts)


@either
@given(tokens=few_tokens, cuts=st.lists(st.integers(0, 40), max_size=6), other=few_tokens)
def test_chunks_do_not_matter(method: str, tokens: list[int], cuts: list[int], other: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    whole, chunked = create_drafter(CONFIGS[method]), create_drafter(CONFIGS[method])
    for drafter in (whole, chunked):
        finish(drafter, [1], [1, 2, 3, 1, 2, 0])
    chunked.begin("a", tokens[: bounds[1]])
    chunked.begin("b", other)  # which is none of a's business
    for start, stop in itertools.pairwise(bounds[1:]):
        chunked.propose("a", 3)
        chunked.extend("a", tokens[start:stop])
    assert chunked.propose("a", 5) == propose(whole, tokens)


@either
def test_ended_sequences_are_forgotten(method: str) -> None:
    drafter = create_drafter(CONFIGS[method])
    for key in ("a", "b"):
        drafter.begin(key, [1, 2, 1])
    drafter.end("a", finished=False)
    drafter.end("a", finished=False)
    drafter.end("never begun", finished=True)
    with pytest.raises(KeyError):
        drafter.propose("a", 1)
    drafter.begin("a", [5, 6, 5, 6, 5])
    assert drafter.propose("a", 1) == [6]
    assert drafter.propose("b", 1) == [2]


@either
@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_loop_goes_on(method: str, period: int) -> None:
    tokens = (list(range(period)) * 24)[:24]
    draft = propose(create_drafter(CONFIGS[method]), tokens, 16)
    assert draft == [(len(tokens) + i) % period for i in range(16)][: len(draft)]
    assert len(draft) > 8


@either
def test_work_does_not_grow_with_the_text(method: str) -> None:
    """Lines of Python that run, as speed is for benchmarks; here, how many tokens are in common is not bounded."""

    def lines(num_tokens: int) -> int:
        count = 0

        def trace(frame: object, event: str, argument: object) -> object:
            nonlocal count
            count += event == "line"
            return trace

        drafter = create_drafter(CONFIGS[method])
        drafter.begin("a", [1, 2, 3, 4] * (num_tokens // 4))
        before = sys.gettrace()
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            drafter.extend("a", [1])
            drafter.propose("a", 5)
        finally:
            sys.settrace(before)
        return count

    assert lines(8_000) == lines(400) < 1500


# ---- n-grams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], [8, 1]),  # the latest of equals
        ([1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3], [9, 4]),  # the longest before the latest
        ([1, 2, 9, 5, 2, 8, 1, 2], [9, 5]),
        ([1, 2, 3, 4], []),
        ([3, 5, 6, 3], []),  # one token is less than min_ngram
        ([], []),
        ([1], []),
    ],
)
def test_prompt_lookup(tokens: list[int], expected: list[int]) -> None:
    assert propose(NGramDrafter(min_ngram=2, max_ngram=3), tokens, 2) == expected


@given(tokens=few_tokens, low=st.integers(1, 3), more=st.integers(0, 2))
def test_prompt_lookup_is_the_scan_it_stands_for(tokens: list[int], low: int, more: int) -> None:
    expected: list[int] = []
    for n in range(low, low + more + 1):
        for index in range(n, len(tokens)):
            if tokens[index - n : index] == tokens[-n:]:
                copied = tokens[index:]
                expected = [copied[i % len(copied)] for i in range(4)]
    assert propose(NGramDrafter(low, low + more), tokens, 4) == expected


# ---- suffixes -------------------------------------------------------------------------------------------------------


def test_the_longest_suffix_wins_then_the_most_frequent_continuation() -> None:
    drafter = SuffixDrafter(min_probability=0.01, max_cached_tokens=100)
    assert propose(drafter, [1, 2, 3, 9, 0, 2, 3, 8, 0, 2, 3, 8, 1, 2, 3], 1) == [9]
    assert propose(drafter, [1, 2, 3, 4, 5, 9, 0, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5], 1) == [9]
    assert propose(drafter, [2, 3, 8, 0, 2, 3, 8, 4, 2, 3, 9, 5, 2, 3], 1) == [8]
    assert propose(drafter, [2, 3, 8, 0, 2, 3, 9, 4, 2, 3], 1) == [9]  # of equally frequent ones the latest


def test_other_outputs_are_drafted_from_and_prompts_are_not() -> None:
    drafter = SuffixDrafter(min_probability=0.1, max_cached_tokens=100)
    finish(drafter, [50, 51, 52, 53, 54], [60, 61, 62, 63, 64])
    finish(drafter, [1], [70, 71, 72, 73], finished=False)
    assert propose(drafter, [1, 60, 61, 62], 2) == [63, 64]
    assert propose(drafter, [1, 50, 51, 52]) == []
    assert propose(drafter, [1, 70, 71, 72]) == []
    assert propose(drafter, [1, 62, 63, 64]) == []  # there the output ended
    drafter.begin("resumed", [80, 81, 90, 91, 92], num_prompt_tokens=2)
    drafter.end("resumed", finished=True)
    assert propose(drafter, [90, 91], 1) == [92]
    assert propose(drafter, [80, 81]) == []


@pytest.mark.parametrize("num_common", [1, 2, 4, 8])
def test_a_draft_ends_where_it_gets_improbable(num_common: int) -> None:
    tokens = [*range(40), 99, *range(num_common)]
    assert num_common != 1 or propose(SuffixDrafter(0.5, 0), tokens) == []
    lengths = [len(propose(SuffixDrafter(p, 0), tokens, 16)) for p in (0.9, 0.5, 0.2, 0.05, 0.001)]
    assert lengths == sorted(lengths)
    # p of k tokens is the product over i < k of (m + i) / (m + i + 3.5)
    probability, expected = 1.0, 0
    while (probability := probability * (num_common + expected) / (num_common + expected + 3.5)) >= 0.2:
        expected += 1
    assert lengths[2] == expected


def test_what_others_agree_on_is_followed_further() -> None:
    drafter = SuffixDrafter(0.3, 100)
    lengths = []
    for _ in range(3):
        finish(drafter, [1], [10, 11, 12, 13, 14, 15, 16])
        lengths.append(len(propose(drafter, [5, 10])))
    assert lengths[0] < lengths[1] <= lengths[2] == 5


def test_the_oldest_outputs_make_room() -> None:
    drafter = SuffixDrafter(0.1, max_cached_tokens=12)
    for first in (10, 20, 30, 40):
        finish(drafter, [1], [first, first + 1, first + 2, first + 3])
    drafts = {first: propose(drafter, [first, first + 1], 1) for first in (10, 20, 30, 40)}
    assert drafts == {10: [], 20: [22], 30: [32], 40: [42]}
    finish(drafter, [1], list(range(60, 90)))  # more than there is room for: its end
    assert propose(drafter, [62, 63]) == [] == propose(drafter, [40, 41])
    assert propose(drafter, [80, 81], 1) == [82]


@settings(max_examples=60)
@given(outputs=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=30), max_tokens=st.integers(0, 20))
def test_what_is_kept_is_bounded_and_like_new(outputs: list[list[int]], max_tokens: int) -> None:
    """After any outputs, what is left of the index is what the kept ones alone would have made."""
    kept = FinishedOutputs(max_tokens)
    for output in outputs:
        kept.add(output)
        assert kept.num_tokens <= max_tokens
        assert len(kept.text.token_ids) <= 2 * max_tokens + 1
    anew = FinishedOutputs(max_tokens)
    last: list[list[int]] = []
    for output in reversed([output[max(0, len(output) - max_tokens) :] for output in outputs]):
        if sum(map(len, last)) + len(output) > max_tokens:
            break
        last.insert(0, output)
    for output in last:
        anew.add(output)
    assert kept.text.token_ids == anew.text.token_ids
    for n in (1, 3, 8):
        contexts = {tuple(kept.text.token_ids[i : i + n]) for i in range(len(kept.text.token_ids) - n + 1)}
        for context in contexts:
            assert kept.text.find(context, 5) == anew.text.find(context, 5)
        ours, theirs = kept.text._by_length[n], anew.text._by_length[n]
        assert len(ours[0]) == len(theirs[0]) and len(ours[1]) == len(theirs[1]), "nothing of the dropped is left"


@given(tokens=few_tokens, context=st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_occurrences_are_all_and_the_latest_first(tokens: list[int], context: list[int]) -> None:
    text = Occurrences([2])
    text.extend(tokens)
    expected = [i + 1 for i in range(2, len(tokens)) if tokens[i - 2 : i] == context][::-1]
    assert text.find(context, 100) == expected
    assert text.find(context, 2) == expected[:2]


# ---- how much is drafted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", [0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("cost", [0.0, 0.02, 0.1, 0.4, 1.0])
def test_the_best_length_is_the_best(acceptance: float, cost: float) -> None:
    def tokens_over_time(k: int) -> float:
        return sum(acceptance**i for i in range(k + 1)) / (1 + k * cost)

    best = best_length(acceptance, cost, 16)
    assert tokens_over_time(best) == pytest.approx(max(map(tokens_over_time, range(17))))


def simulate(length: DraftLength, acceptance: float, steps: int, seed: int = 0, proposed: int = 8) -> list[int]:
    """The lengths chosen, where each draft is accepted with that probability if those before it were."""
    draw = random.Random(seed)
    chosen = []
    for _ in range(steps):
        count = length.choose(proposed, marginal_cost=0.02, batch_size=4)
        accepted = 0
        while accepted < count and draw.random() < acceptance:
            accepted += 1
        length.observe(proposed, count, accepted)
        chosen.append(count)
    return chosen


@pytest.mark.parametrize(("acceptance", "least", "most"), [(0.95, 7, 8), (0.5, 2, 3), (0.03, 0, 0.2)])
def test_length_converges(acceptance: float, least: float, most: float) -> None:
    chosen = simulate(DraftLength(8), acceptance, 400)
    assert least <= sum(chosen[100:]) / 300 <= most


def test_drafts_that_fail_are_tried_again_ever_less_often_and_come_back() -> None:
    length = DraftLength(8)
    chosen = simulate(length, 0.0, 600)
    tried = [step for step, count in enumerate(chosen) if count]
    pauses = [b - a for a, b in itertools.pairwise(tried)]
    assert pauses == sorted(pauses) and pauses[-1] == 128
    assert max(chosen[100:]) == 1
    back = simulate(length, 1.0, 200)
    assert back.index(1) < 128 and back[-1] == 8


def test_a_fuller_batch_and_a_dearer_row_draft_less() -> None:
    length = DraftLength(8)
    by_batch = [length.choose(8, 0.02, batch_size) for batch_size in (1, 4, 16, 64)]
    by_cost = [length.choose(8, cost, 1) for cost in (0.0, 0.05, 0.2, 0.7)]
    by_draft_cost = [length.choose(8, 0.02, 1, draft_cost) for draft_cost in (0.0, 0.1, 0.3)]
    for lengths in (by_batch, by_cost, by_draft_cost):
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert by_batch[-1] == 0 and by_cost[0] == 8


def test_long_proposals_are_judged_by_long_ones() -> None:
    """A drafter that proposes one token where it is unsure, and five where it is not."""
    length = DraftLength(5)
    for _ in range(60):
        length.observe(1, length.choose(1, 0.05, 4), 0)
        length.observe(5, count := length.choose(5, 0.05, 4), count)
    assert length.choose(1, 0.05, 4) == 0 and length.choose(5, 0.05, 4) == 5
    assert length.choose(0, 0.05, 4) == 0


@pytest.mark.parametrize("num_rows", [1, 8, 32])
def test_step_cost_finds_the_slope(num_rows: int) -> None:
    cost = StepCost()
    assert 0 < cost.marginal(num_rows) <= 1 / num_rows
    draw = random.Random(0)
    for _ in range(300):
        rows = draw.randint(1, 40)
        cost.observe(rows, (5 + 0.25 * rows) * draw.uniform(0.9, 1.1))
    assert cost.marginal(num_rows) == pytest.approx(0.25 / (5 + 0.25 * num_rows), rel=0.1)


@pytest.mark.parametrize("slope", [-1.0, 0.0, 9.0])
def test_step_cost_stays_sane(slope: float) -> None:
    cost = StepCost()
    for rows in (1, 4, 2, 8, 30, 1, 3):
        cost.observe(rows, max(0.1, 10 + slope * rows if slope <= 0 else rows**3))
        assert all(0 <= cost.marginal(n) <= 1 / n + 1e-9 for n in (1, 2, 64))


def test_one_step_that_waited_for_something_else_says_little() -> None:
    cost = StepCost()
    for i in range(200):
        cost.observe(1 + i % 4, 1.0 + 0.1 * (i % 4))
    before = cost.marginal(4)
    assert cost.seconds(4) == pytest.approx(1.3, rel=0.05)
    cost.observe(4, 1000.0)
    assert cost.seconds(4) < 1.4 and cost.marginal(4) == pytest.approx(before, rel=0.3)


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5, 2.0])
def test_tries_take_a_hundredth_of_the_time(cost: float) -> None:
    length, num_tried = DraftLength(5, prior=0.0), 0
    for _ in range(2000):
        count = length.choose(5, marginal_cost=0.01, batch_size=2, draft_cost=cost)
        assert count <= 1
        length.observe(5, count, 0)
        num_tried += count
    assert num_tried >= 1 and num_tried * 2 * (0.01 + cost) <= 0.02 * 2000


def test_a_sequence_begins_with_what_the_others_drafts_were_worth() -> None:
    speculator = create_speculator(SpeculativeConfig(method="ngram"), longest=0)
    for number in range(30):
        sequence = Sequence(str(number), [1, 2, 3, 1, 2], max_tokens=20)
        drafts = speculator.propose(sequence, 8, batch_size=1)
        assert (len(drafts) > 1) == (number < 3)
        speculator.observe(sequence, len(drafts), 0)
        speculator.end(sequence)


def test_config_chooses() -> None:
    assert isinstance(create_drafter(SpeculativeConfig()), SuffixDrafter)
    assert isinstance(create_drafter(SpeculativeConfig(method="ngram")), NGramDrafter)
    assert isinstance(create_draft_length(SpeculativeConfig(), 0.5), DraftLength)
    fixed = create_draft_length(SpeculativeConfig(adaptive=False), 0.5)
    assert isinstance(fixed, FixedDraftLength) and fixed.choose(5, 1.0, 64) == 5
