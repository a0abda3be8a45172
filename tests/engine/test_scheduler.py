"""The scheduler on exact steps, and as a whole against a simulated model and a simulated KV cache."""

import itertools
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from meshlm import SamplingParams
from meshlm.config import SpeculativeConfig
from meshlm.engine.beam_search import BeamSearch, num_candidates
from meshlm.engine.block_manager import BlockManager
from meshlm.engine.logits_spec import LogitsSpec
from meshlm.engine.scheduler import ScheduledStep, Scheduler
from meshlm.engine.sequence import EXPECTED_TOKENS, SampleSpec, Sequence, SequenceStatus
from meshlm.engine.speculation.speculator import DrafterSpeculator, DraftModelSpeculator
from meshlm.engine.step import SampleSettings, StepOutput, TokenLogprobs, drawn_before


def make(num_blocks: int = 64, block_size: int = 4, **values: Any) -> Scheduler:
    caching = values.pop("enable_prefix_caching", True)
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 64, **values}
    return Scheduler(BlockManager(num_blocks, block_size, caching), **values)


def add(scheduler: Scheduler, name: str, tokens: Any, max_tokens: int = 8, **values: Any) -> Sequence:
    sequence = Sequence(name, list(tokens), max_tokens=max_tokens, **values)
    scheduler.add(sequence)
    return sequence


def next_step(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule()
    assert step is not None
    scheduler.check()
    return step


def counts(step: ScheduledStep) -> dict[str, int]:
    lens = step.input.query_lens
    return {sequence.request_id: n for sequence, n in zip(step.sequences, lens, strict=True)}


def has_work(scheduler: Scheduler) -> bool:
    return bool(scheduler.waiting or scheduler.running or scheduler.ended_in_flight)


def back(scheduler: Scheduler, step: ScheduledStep, token_ids: Iterable[int], **asked: Any) -> list[Sequence]:
    return scheduler.update(step, StepOutput(step.input.step_id, tuple(token_ids), **asked))


def run_step(scheduler: Scheduler, token: int = 7) -> dict[str, int]:
    """Schedules a step, draws `token` for each of its samples; new tokens by name."""
    step = next_step(scheduler)
    back(scheduler, step, (token,) * len(step.input.samples))
    scheduler.check()
    return counts(step)


# ---- chunks and admission -------------------------------------------------------------------------------------------


def test_a_step_is_flat_and_exact() -> None:
    scheduler = make(block_size=2)
    add(scheduler, "a", [10, 11, 12])
    add(scheduler, "b", [20])
    step = next_step(scheduler)
    assert list(step.input.token_ids) == [10, 11, 12, 20]
    assert step.input.query_lens == (3, 1) and step.input.context_lens == (0, 0)
    assert [list(table) for table in step.input.block_tables] == [[0, 1], [2]]
    assert [(sample.row, sample.position) for sample in step.input.samples] == [(2, 3), (3, 1)]
    grown = back(scheduler, step, (50, 60))
    assert [s.token_ids for s in grown] == [[10, 11, 12, 50], [20, 60]]
    step = next_step(scheduler)
    assert step.input.step_id == 2
    assert list(step.input.token_ids) == [50, 60]
    assert step.input.query_lens == (1, 1) and step.input.context_lens == (3, 1)
    assert [list(table) for table in step.input.block_tables] == [[0, 1], [2]]


def test_a_long_prompt_comes_in_chunks_and_draws_once() -> None:
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "a", range(10))
    samples = []
    for expected in ({"a": 4}, {"a": 4}, {"a": 2}, {"a": 1}):
        step = next_step(scheduler)
        assert counts(step) == expected
        samples.append(len(step.input.samples))
        back(scheduler, step, (7,) * samples[-1])
    assert samples == [0, 0, 1, 1]


def test_running_sequences_come_before_new_ones_in_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "a", range(3))
    assert run_step(scheduler) == {"a": 3}
    add(scheduler, "b", range(20, 30))
    assert run_step(scheduler) == {"a": 1, "b": 3}
    assert run_step(scheduler) == {"a": 1, "b": 3}
    add(scheduler, "c", [1])
    assert run_step(scheduler) == {"a": 1, "b": 3}
    assert run_step(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_max_num_seqs_bounds_what_runs() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        add(scheduler, name, [1, 2], max_tokens=2)
    assert run_step(scheduler) == {"a": 2, "b": 2}
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert run_step(scheduler) == {"c": 2}


def test_a_new_sequence_waits_for_room_and_a_spare_block_for_each_that_runs() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    add(scheduler, "a", [1, 2])
    add(scheduler, "b", [3, 4, 5, 6])
    add(scheduler, "c", [7])
    assert run_step(scheduler) == {"a": 2, "b": 4}  # 3 blocks; c would take the fourth, and leave none to grow
    assert [s.request_id for s in scheduler.waiting] == ["c"]


def test_the_queue_is_first_come_first_served() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    add(scheduler, "a", range(4))
    add(scheduler, "big", range(20, 26))
    add(scheduler, "small", [9])
    assert run_step(scheduler) == {"a": 4}, "the small one does not overtake the big one for ever"


def test_a_prefix_hit_starts_further_along() -> None:
    scheduler = make()
    first = add(scheduler, "a", range(10), max_tokens=1)
    run_step(scheduler)
    assert first.num_cached_tokens == 0 and first.finish_reason == "length"
    second = add(scheduler, "b", [*range(8), 99], max_tokens=1)
    step = next_step(scheduler)
    assert (second.num_cached_tokens, step.input.context_lens, list(step.input.token_ids)) == (8, (8,), [99])
    assert list(step.input.block_tables[0])[:2] == [0, 1]


def test_requests_that_come_together_compute_their_common_prefix_once() -> None:
    scheduler = make()
    first, *others = [add(scheduler, name, [*range(8), 90 + i]) for i, name in enumerate("abc")]
    step = next_step(scheduler)
    assert counts(step) == {"a": 9, "b": 1, "c": 1} and step.input.context_lens == (0, 8, 8)
    assert [list(table)[:2] for table in step.input.block_tables] == [[0, 1]] * 3
    assert first.num_cached_tokens == 0 and [other.num_cached_tokens for other in others] == [8, 8]


@pytest.mark.parametrize("is_aborted", [False, True])
def test_a_prefix_is_taken_from_a_step_that_is_not_back(is_aborted: bool) -> None:
    scheduler = make(num_stages=2)
    a = add(scheduler, "a", range(9))
    first = next_step(scheduler)
    b = add(scheduler, "b", range(9))
    if is_aborted:
        scheduler.finish(a, "abort")
    second = next_step(scheduler)
    assert counts(second) == {"b": 1} and second.input.context_lens == (8,)
    assert second.input.block_tables[0][:2] == first.input.block_tables[0][:2]
    back(scheduler, first, (7,))
    scheduler.check()
    assert b.block_table[:2] == [0, 1] and scheduler.blocks.num_free_blocks == (61 if is_aborted else 60)


def test_of_a_chunk_only_full_blocks_are_taken() -> None:
    scheduler = make(max_num_batched_tokens=6)
    a = add(scheduler, "a", range(9))
    first = next_step(scheduler)
    assert scheduler.blocks.match(a.token_ids) == [0]
    back(scheduler, first, ())
    add(scheduler, "b", range(9))
    assert counts(next_step(scheduler)) == {"a": 3, "b": 1}


def test_drafts_are_not_taken_by_others_before_they_are_accepted() -> None:
    scheduler = make(block_size=2)
    a = add(scheduler, "a", [1, 2, 3], forced=(4, 5, 6))
    step = next_step(scheduler)
    assert step.drafts == ((4, 5, 6),) and scheduler.blocks.match([1, 2, 3, 4, 5, 6, 7]) == a.block_table[:1]
    back(scheduler, step, (4, 5, 6, 7))
    assert scheduler.blocks.match([1, 2, 3, 4, 5, 6, 7]) == a.block_table[:3]


# ---- preemption -----------------------------------------------------------------------------------------------------


def test_the_latest_gives_way_and_comes_back_first() -> None:
    scheduler = make(num_blocks=4, block_size=2, enable_prefix_caching=False)
    a = add(scheduler, "a", [1, 2], max_tokens=6)
    b = add(scheduler, "b", [3, 4], max_tokens=6)
    assert run_step(scheduler) == {"a": 2, "b": 2}
    late = add(scheduler, "late", [5])
    assert run_step(scheduler) == {"a": 1, "b": 1}
    assert run_step(scheduler) == {"a": 1, "b": 1}  # two full blocks each now
    assert run_step(scheduler) == {"a": 1}
    assert (b.status, b.num_preemptions, scheduler.num_preemptions) == (SequenceStatus.WAITING, 1, 1)
    assert b.block_table == [] and b.num_computed_tokens == 0 and b.token_ids == [3, 4, 7, 7, 7]
    assert list(scheduler.waiting) == [b, late], "a preempted one goes to the front"
    while a.status is SequenceStatus.RUNNING:
        assert "b" not in run_step(scheduler)
    step = next_step(scheduler)
    assert counts(step)["b"] == 5, "prompt and output so far are computed again"
    assert list(step.input.token_ids)[:5] == [3, 4, 7, 7, 7]
    assert b.num_cached_tokens == 0, "counted at its first admission only"


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=5, block_size=2)
    add(scheduler, "a", [1, 2], max_tokens=5)
    b = add(scheduler, "b", [3, 4], max_tokens=5)
    while not b.num_preemptions:
        run_step(scheduler)
    while b.status is SequenceStatus.WAITING:
        step = next_step(scheduler)
        back(scheduler, step, (7,) * len(step.input.samples))
    assert step.input.context_lens[counts(step).keys().__iter__().__next__() != "b"] > 0


def test_a_sequence_in_flight_is_not_preempted() -> None:
    scheduler = make(num_blocks=4, block_size=2, num_stages=2, enable_prefix_caching=False)
    add(scheduler, "a", [1, 2], max_tokens=9)
    b = add(scheduler, "b", [3, 4], max_tokens=9)
    flight = deque([next_step(scheduler), next_step(scheduler)])
    assert [counts(step) for step in flight] == [{"a": 2}, {"b": 2}]
    for _ in range(4):  # a and b in turn, until each holds two full blocks
        step = flight.popleft()
        back(scheduler, step, (7,) * len(step.input.samples))
        flight.append(next_step(scheduler))
    step = flight.popleft()
    assert counts(step) == {"a": 1}
    back(scheduler, step, (7,))
    assert b.num_in_flight == 1
    assert scheduler.schedule() is None or b.status is SequenceStatus.RUNNING
    assert b.status is SequenceStatus.RUNNING and b.block_table
    scheduler.check()


# ---- priorities -----------------------------------------------------------------------------------------------------


def test_lower_priorities_are_served_first_and_equal_ones_as_they_came() -> None:
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -5), ("e", 0), ("f", -5)):
        add(scheduler, name, [1, 2], max_tokens=1, priority=priority)
    served = []
    while has_work(scheduler):
        served += run_step(scheduler)
    assert served == ["d", "f", "b", "e", "a", "c"]


def test_who_comes_first_in_the_budget() -> None:
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "low", range(10), priority=1)
    assert run_step(scheduler) == {"low": 4}
    add(scheduler, "same", range(40, 43), priority=1)
    add(scheduler, "high", range(20, 23))
    assert run_step(scheduler) == {"high": 3, "low": 1}
    assert run_step(scheduler) == {"high": 1, "low": 3}
    assert run_step(scheduler) == {"high": 1, "low": 2, "same": 1}, "of equal ones, who runs before who waits"


@pytest.mark.parametrize("short_of", ["places", "blocks"])
def test_a_waiting_sequence_preempts_those_of_lower_priority_only(short_of: str) -> None:
    limits = {"max_num_seqs": 3} if short_of == "places" else {"num_blocks": 9, "block_size": 2}
    scheduler = make(enable_prefix_caching=False, **limits)
    first, second, third = (add(scheduler, f"p{p}", [p] * 2, max_tokens=3, priority=p) for p in (2, 0, 1))
    assert run_step(scheduler) == {"p0": 2, "p1": 2, "p2": 2}
    high = add(scheduler, "high", [9] * 8, max_tokens=2)
    assert run_step(scheduler) == {"p0": 1, "high": 8, "p1": 1}
    assert [s.num_preemptions for s in (first, second, third, high)] == [1, 0, 0, 0]
    while has_work(scheduler):
        run_step(scheduler)
    assert [s.num_output_tokens for s in (first, second, third, high)] == [3, 3, 3, 2]


def test_equal_priorities_do_not_preempt_each_other() -> None:
    scheduler = make(max_num_seqs=1)
    add(scheduler, "a", [1, 2], max_tokens=4, priority=1)
    run_step(scheduler)
    add(scheduler, "b", [3], max_tokens=1, priority=1)
    for _ in range(3):
        assert run_step(scheduler) == {"a": 1}
    assert run_step(scheduler) == {"b": 1} and scheduler.num_preemptions == 0


def test_of_equal_priorities_the_latest_to_come_gives_way_though_it_was_admitted_first() -> None:
    scheduler = make(num_blocks=6, block_size=2, enable_prefix_caching=False)
    low, early = add(scheduler, "low", [1, 2], priority=1), add(scheduler, "early", [3, 4])
    run_step(scheduler)
    late = add(scheduler, "late", [5, 6])
    while not scheduler.num_preemptions:
        run_step(scheduler)
    assert (low.num_preemptions, early.num_preemptions, late.num_preemptions) == (1, 0, 0)
    while not late.num_preemptions and not early.num_preemptions:
        run_step(scheduler)
    assert (early.num_preemptions, late.num_preemptions) == (0, 1)


# ---- endings --------------------------------------------------------------------------------------------------------


def test_length_stop_ids_and_min_tokens() -> None:
    scheduler = make()
    length = add(scheduler, "length", [1], max_tokens=3, stop_token_ids=frozenset({99}))
    stopped = add(scheduler, "stopped", [2], max_tokens=9, stop_token_ids=frozenset({7, 8}))
    late = add(scheduler, "late", [3], max_tokens=9, min_tokens=2, stop_token_ids=frozenset({7}))
    step = next_step(scheduler)
    back(scheduler, step, (7, 7, 5))
    assert (stopped.finish_reason, stopped.output_token_ids) == ("stop", [7])
    step = next_step(scheduler)
    back(scheduler, step, (7, 5))
    step = next_step(scheduler)
    grown = back(scheduler, step, (7, 7))
    assert grown == [length, late]
    assert (length.finish_reason, length.output_token_ids) == ("length", [7, 7, 7])
    assert (late.finish_reason, late.output_token_ids) == ("stop", [5, 5, 7])
    assert not has_work(scheduler) and scheduler.schedule() is None
    assert scheduler.blocks.num_free_blocks == scheduler.blocks.num_blocks


def test_a_stop_token_that_is_also_the_last_is_a_stop() -> None:
    scheduler = make()
    sequence = add(scheduler, "a", [1], max_tokens=1, stop_token_ids=frozenset({7}))
    run_step(scheduler, 7)
    assert sequence.finish_reason == "stop"


def test_abort_while_waiting_running_and_in_flight() -> None:
    scheduler = make(max_num_seqs=1, block_size=2)
    running, waiting = add(scheduler, "r", [1, 2, 3]), add(scheduler, "w", [1])
    run_step(scheduler)
    scheduler.finish(waiting, "abort")
    assert waiting.finish_reason == "abort" and not scheduler.waiting
    scheduler.finish(running, "abort")
    assert running.status is SequenceStatus.FINISHED and not has_work(scheduler)
    assert scheduler.blocks.num_free_blocks == 64
    scheduler.finish(running, "length")
    assert running.finish_reason == "abort", "an ending is the last"

    flying = add(scheduler, "f", [4, 5, 6])
    step = next_step(scheduler)
    scheduler.finish(flying, "abort")
    scheduler.check()
    assert has_work(scheduler) and scheduler.blocks.num_free_blocks == 62, "the ranks still write to its blocks"
    assert back(scheduler, step, (7,)) == [], "the token that was drawn for it is dropped"
    assert flying.output_token_ids == [] and scheduler.blocks.num_free_blocks == 64
    assert not has_work(scheduler)
    scheduler.check()


def test_a_place_is_free_as_soon_as_its_sequence_was_aborted() -> None:
    scheduler = make(max_num_seqs=1, num_stages=2)
    first = add(scheduler, "a", [1, 2])
    step = next_step(scheduler)
    add(scheduler, "b", [3])
    assert scheduler.schedule() is None
    scheduler.finish(first, "abort")
    other = next_step(scheduler)
    assert counts(other) == {"b": 1}
    back(scheduler, step, (7,))
    back(scheduler, other, (7,))
    scheduler.check()


def test_finished_sequences_do_not_come_back() -> None:
    sequence = Sequence("a", [1], max_tokens=1)
    sequence.move_to(SequenceStatus.FINISHED)
    with pytest.raises(AssertionError):
        sequence.move_to(SequenceStatus.RUNNING)


def test_pending_tokens_are_counted_as_they_come_and_go() -> None:
    scheduler = make(max_num_batched_tokens=4)
    first = add(scheduler, "a", range(6))
    add(scheduler, "b", range(20, 23))
    assert scheduler.num_pending_tokens == 9
    step = next_step(scheduler)
    assert scheduler.num_pending_tokens == 9, "in flight counts until it is back"
    back(scheduler, step, ())
    assert scheduler.num_pending_tokens == 5
    run_step(scheduler)
    assert scheduler.num_pending_tokens == 2, "the token that a drew, and the last of b"
    scheduler.finish(first, "abort")
    assert scheduler.num_pending_tokens == 1
    scheduler.num_pending_tokens += 1
    with pytest.raises(AssertionError):
        scheduler.check()


@given(
    known=st.lists(st.integers(1, 30), max_size=3),
    queued=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 9), st.integers(1, 8)), min_size=1),
    num_stages=st.integers(1, 3),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 5),
    caching=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_work_is_what_will_be_computed(
    known: list[int],
    queued: list[tuple[int, int, int, int]],
    num_stages: int,
    budget: int,
    max_num_seqs: int,
    caching: bool,
) -> None:
    """To the token, step by step, a prefix that the cache holds left out from the moment that a request is queued.

    known: lengths of prompts that were served before; queued: requests, each with a beginning of one of these (which,
    how long), tokens of its own and its output's length.
    """
    fresh = itertools.count(1)  # no two tokens alike, so that requests have only these beginnings in common
    scheduler = make(
        num_blocks=4096,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        num_stages=num_stages,
        enable_prefix_caching=caching,
    )
    prompts = [[next(fresh) for _ in range(length)] for length in known]
    for i, prompt in enumerate(prompts):
        add(scheduler, f"known {i}", prompt, max_tokens=1)
    while has_work(scheduler):
        run_step(scheduler, token=next(fresh))
    for i, (which, num_known, num_own, max_tokens) in enumerate(queued):
        prefix = prompts[which][:num_known] if which < len(prompts) else []
        prompt = [*prefix, *(next(fresh) for _ in range(num_own))]
        before, cached = scheduler.work, scheduler.num_cached(Sequence("", prompt, 1))
        assert cached == (len(prefix) // 4 * 4 if caching else 0)
        add(scheduler, f"queued {i}", prompt, max_tokens=max_tokens)
        assert scheduler.work - before == len(prompt) - cached + max_tokens - 1
    flight: deque[ScheduledStep] = deque()
    while has_work(scheduler):
        before = scheduler.work
        while len(flight) < num_stages and (step := scheduler.schedule()) is not None:
            flight.append(step)
        assert scheduler.work == before, "admitted as estimated"
        step = flight.popleft()
        back(scheduler, step, tuple(next(fresh) for _ in step.input.samples))
        scheduler.check()
        assert scheduler.work == before - step.input.num_tokens
    assert scheduler.work == 0


def test_work_expects_no_more_of_an_output_than_most_outputs_have() -> None:
    scheduler = make()
    sequence = add(scheduler, "a", range(10), max_tokens=10_000)
    assert scheduler.work == 10 + EXPECTED_TOKENS - 1
    for _ in range(EXPECTED_TOKENS + 3):
        run_step(scheduler)
    assert scheduler.work == sequence.num_pending_tokens == 1
    scheduler.finish(sequence, "stop")
    assert scheduler.work == 0


# ---- a pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_get_steps_of_equal_size_on_disjoint_sequences(num_stages: int) -> None:
    scheduler = make(num_stages=num_stages)
    for i in range(4 * num_stages):
        add(scheduler, f"s{i}", [i, i, i], max_tokens=50)
    flight: deque[ScheduledStep] = deque()
    for tick in range(30):
        while len(flight) < num_stages:
            flight.append(next_step(scheduler))
            names = [name for step in flight for name in counts(step)]
            assert len(set(names)) == len(names)
        if tick > num_stages:
            assert [len(step.sequences) for step in flight] == [4] * num_stages
        step = flight.popleft()
        back(scheduler, step, (7,) * len(step.input.samples))


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_step_ahead_takes_what_the_oldest_draws(num_stages: int) -> None:
    """So that the first stage has it when the step is its turn."""
    scheduler = make(num_stages=num_stages, look_ahead=True)
    for i in range(4 * num_stages):
        add(scheduler, f"s{i}", [i, i, i], max_tokens=50)
    flight: deque[ScheduledStep] = deque()
    for tick in range(30):
        while len(flight) < num_stages + 1:
            flight.append(next_step(scheduler))
        assert scheduler.max_in_flight == num_stages + 1
        if tick > num_stages:
            assert [len(step.sequences) for step in flight] == [4] * len(flight)
            assert flight[-1].input.ahead_of == flight[0].input.step_id
            assert set(flight[-1].sequences) == set(flight[0].sequences)
            assert min(flight[-1].input.token_ids) < 0
        step = flight.popleft()
        back(scheduler, step, (7,) * len(step.input.samples))


def test_a_step_is_ahead_of_one_other() -> None:
    """It would wait for the later of two."""
    scheduler = make(num_stages=2, look_ahead=True)
    add(scheduler, "a", range(3), max_tokens=9)
    first = next_step(scheduler)
    add(scheduler, "b", range(10, 13), max_tokens=9)
    second = next_step(scheduler)
    assert [counts(first), counts(second)] == [{"a": 3}, {"b": 3}]
    third = next_step(scheduler)
    assert counts(third) == {"a": 1} and third.input.ahead_of == first.input.step_id
    back(scheduler, first, (7,))
    fourth = next_step(scheduler)
    assert counts(fourth) == {"b": 1} and fourth.input.ahead_of == second.input.step_id


@pytest.mark.parametrize("num_stages", [1, 2])
def test_who_is_ahead_can_be_preempted(num_stages: int) -> None:
    """A request of a higher priority waits for its blocks for no longer than the steps in flight take."""
    scheduler = make(num_blocks=4, num_stages=num_stages, look_ahead=True, enable_prefix_caching=False)
    low = add(scheduler, "low", range(10), max_tokens=100, priority=1)
    flight = deque([next_step(scheduler), next_step(scheduler)])
    high = add(scheduler, "high", range(20, 28), max_tokens=9)
    for _ in range(3):
        step = flight.popleft()
        back(scheduler, step, (7,) * len(step.input.samples))
        while (following := scheduler.schedule()) is not None and len(flight) < scheduler.max_in_flight:
            flight.append(following)
        if high.status is SequenceStatus.RUNNING:
            break
    assert high.status is SequenceStatus.RUNNING and low.status is SequenceStatus.WAITING


def test_chunks_of_a_prompt_follow_each_other_through_the_stages() -> None:
    scheduler = make(num_stages=2, look_ahead=True, max_num_batched_tokens=4)
    add(scheduler, "a", range(10), max_tokens=9)
    assert [counts(next_step(scheduler))["a"] for _ in range(3)] == [4, 4, 2]
    assert [counts(next_step(scheduler))["a"]] == [1], "ahead of the draw that comes after the prompt"


def test_one_sequence_has_one_step_in_flight() -> None:
    scheduler = make(num_stages=2, max_num_batched_tokens=4)
    add(scheduler, "a", range(20))
    next_step(scheduler)
    assert scheduler.schedule() is None


def test_new_sequences_fill_a_stage_that_would_idle() -> None:
    scheduler = make(num_stages=2)
    add(scheduler, "a", range(4))
    first = next_step(scheduler)
    add(scheduler, "b", range(10, 14))
    second = next_step(scheduler)
    assert [counts(first), counts(second)] == [{"a": 4}, {"b": 4}]


# ---- samples --------------------------------------------------------------------------------------------------------


def test_sampled_requests_carry_their_seed_and_greedy_ones_none() -> None:
    scheduler = make()
    add(scheduler, "greedy", [1, 2], sample=SampleSpec(seed=5))
    add(scheduler, "sampled", [1, 2, 3], sample=SampleSpec(0.5, 7, 0.9, 0.1, seed=11))
    greedy, sampled = next_step(scheduler).input.samples
    assert greedy == (1, 2, SampleSettings(0, 0.0, 0, 1.0, 0.0))
    assert sampled == (4, 3, SampleSettings(11, 0.5, 7, 0.9, 0.1))


# ---- as a whole -----------------------------------------------------------------------------------------------------

VOCABULARY = 3  # few tokens: prefixes are shared, and outputs run into them


def model(seed: int, tokens: tuple[int, ...]) -> int:
    """The simulated model: a token that depends on every token before it and on their places."""
    return hash((seed, tokens)) % VOCABULARY  # of integers: the same in every process


def draw(sequence: Sequence, tokens: tuple[int, ...]) -> int:
    """The token after these; a stop token is drawn no sooner than min_tokens allows."""
    num_output = len(tokens) - sequence.num_prompt_tokens
    if num_output < len(sequence.forced):
        return sequence.forced[num_output]
    token = model(sequence.sample.seed, tokens)
    if isinstance(sequence.constraint, Grammar):
        return token % Grammar.num_allowed
    return VOCABULARY if num_output < sequence.min_tokens and token in sequence.stop_token_ids else token


class Grammar:
    """Allows some tokens, and an output of so many; each mask is one word, the number of tokens before it."""

    num_allowed, error = 2, None

    def __init__(self, length: int) -> None:
        self.length, self.num_accepted = length, 0

    def accept(self, token_id: int) -> str | None:
        assert token_id < self.num_allowed
        self.num_accepted += 1
        return "stop" if self.num_accepted == self.length else None

    def masks(self, drafts: Seq[int]) -> tuple[Any, int]:
        left = self.length - self.num_accepted - 1  # the last completes it
        num_valid = next((i for i, token in enumerate(drafts) if token >= self.num_allowed), len(drafts))
        num_valid = min(num_valid, left)
        return np.arange(num_valid + 1, dtype=np.int32).reshape(-1, 1) + self.num_accepted, num_valid


def stops_at_text(sequence: Sequence, output: list[int]) -> bool:
    """Whether an output ends by its text: if it looks for it, with the same token twice."""
    is_at_text = len(output) > 1 and output[-1] == output[-2] and len(output) >= sequence.min_tokens
    return sequence.request_id.startswith("text") and is_at_text


def fails_after(sequence: Sequence, tokens: tuple[int, ...]) -> bool:
    """Whether its logits processor fails on the row after these."""
    return sequence.request_id.startswith("processor") and hash((7, tokens)) % 5 == 0


def heed(sequence: Sequence) -> str | None:
    if sequence.constraint is not None and (reason := sequence.constraint.accept(sequence.token_ids[-1])):
        return reason
    return "stop" if stops_at_text(sequence, sequence.output_token_ids) else None


def alone(sequence: Sequence) -> tuple[list[int], str]:
    """What the request gives with nobody else about."""
    prompt, output = sequence.token_ids[: sequence.num_prompt_tokens], list[int]()
    max_tokens, min_tokens, stops = sequence.max_tokens, sequence.min_tokens, sequence.stop_token_ids
    if not max_tokens:
        return output, "length"
    while True:
        if fails_after(sequence, (*prompt, *output)):
            return output, "error"
        token = draw(sequence, (*prompt, *output))
        output.append(token)
        is_whole = isinstance(sequence.constraint, Grammar) and len(output) == sequence.constraint.length
        if is_whole or stops_at_text(sequence, output) or (len(output) >= min_tokens and token in stops):
            return output, "stop"
        if len(output) == max_tokens:
            return output, "length"


def likeliest(tokens: tuple[int, ...]) -> TokenLogprobs:
    """What the model tells of the tokens that may come after these; they are not equally likely."""
    logprobs = {token: -float(1 + hash((tokens, token)) % 1009) for token in range(VOCABULARY)}
    top = sorted(logprobs, key=lambda token: -logprobs[token])
    return TokenLogprobs(0.0, 0, tuple(top), tuple(logprobs[token] for token in top))


def begin_search(prompt: list[int], num_beams: int, max_tokens: int, priority: int = 0) -> BeamSearch:
    root = Sequence(
        "beams",
        list(prompt),
        max_tokens,
        stop_token_ids=frozenset({0}),
        logits=LogitsSpec(presence_penalty=1.0),
        num_candidates=num_candidates(num_beams, 1),
        num_beams_to_come=num_beams - 1,
        priority=priority,
    )
    params = SamplingParams(num_beams=num_beams, n=num_beams).resolve(SamplingParams())
    return BeamSearch(root, params, lambda: None)


def search_alone(prompt: list[int], num_beams: int, max_tokens: int, priority: int = 0) -> list[list[int]]:
    """What such a search gives with nobody else about."""
    search = begin_search(prompt, num_beams, max_tokens)
    while True:
        for sequence in search.sequences:
            sequence.candidates = likeliest(tuple(sequence.token_ids))
        chosen = search.choose()
        if not chosen:
            return found_by(search)
        heirs = [search.sequences[continuation.beam].fork() for continuation in chosen]
        for heir, continuation in zip(heirs, chosen, strict=True):
            heir.token_ids.append(continuation.token_id)
        search.follow(chosen, heirs)


def found_by(search: BeamSearch) -> list[list[int]]:
    return [hypothesis.sequence.output_token_ids for hypothesis in search.outputs()]


def guess(sequence: Sequence, tokens: tuple[int, ...]) -> int:
    """The token after these, or another: now right, now wrong."""
    token = draw(sequence, tokens)
    return token if hash(tokens) % 4 else token + 1


class Oracle(DrafterSpeculator):
    """Guesses up to a number of tokens, some of them wrong: what comes of the tokens before one that is wrong is not
    looked at."""

    def __init__(self, most: int) -> None:
        super().__init__(SpeculativeConfig(method="ngram", num_speculative_tokens=most))

    def propose(self, sequence: Sequence, most: int, batch_size: int) -> list[int]:
        self._tell(sequence)
        self._choose(sequence, self.max_tokens, batch_size)
        tokens = list(sequence.token_ids)
        for _ in range(min(most, self.max_tokens)):
            tokens.append(guess(sequence, tuple(tokens)))
        return tokens[sequence.num_tokens :]


class OracleModel(DraftModelSpeculator):
    """Lets the draft model draw as many, but for some sequences fewer. longest: so long that it cannot follow."""

    def __init__(self, most: int, longest: int) -> None:
        super().__init__(
            SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=most, adaptive=False), longest
        )

    def num_wanted(self, sequence: Sequence, most: int, batch_size: int) -> int:
        wanted = super().num_wanted(sequence, most, batch_size)
        return min(wanted and self.max_tokens, most, hash(tuple(sequence.token_ids)) % (self.max_tokens + 1))


def test_places_are_kept_for_the_beams_to_come() -> None:
    scheduler = make(max_num_seqs=4)
    (root,) = begin_search([1, 2], num_beams=4, max_tokens=3).sequences
    scheduler.add(root)
    add(scheduler, "other", [3])
    assert run_step(scheduler) == {"beams": 2}


def test_a_beam_comes_back_without_a_spare_block_for_those_that_wait_for_it() -> None:
    scheduler = make(num_blocks=4, block_size=2, enable_prefix_caching=False)
    (root,) = begin_search([1, 2, 3], num_beams=2, max_tokens=3).sequences
    scheduler.add(root)
    step = next_step(scheduler)
    scheduler.update(step, StepOutput(step.input.step_id, (1,), (likeliest((1, 2, 3)),)))
    first, second = scheduler.advance_beams([root], [(0, 1), (0, 2)])
    assert first is root and first.block_table == second.block_table
    scheduler._preempt(second)
    assert next_step(scheduler).sequences == (first, second) and scheduler.num_preemptions == 1


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events; the KV cache is a dict from slot to (token, position), written as a rank would."""

    @initialize(
        block_size=st.integers(1, 4),
        num_tokens=st.integers(18, 30)
        | st.integers(40, 90),  # the longest request has 12 + 6; the engine's max_model_len sees to that
        num_stages=st.integers(1, 3),
        look_ahead=st.booleans(),
        budget=st.sampled_from([1, 2, 5, 16, 64, 64]),
        max_num_seqs=st.integers(1, 6),
        caching=st.booleans(),
        guesses=st.integers(0, 3),
        drafts=st.booleans(),
    )
    def start(
        self,
        block_size: int,
        num_tokens: int,
        num_stages: int,
        look_ahead: bool,
        budget: int,
        max_num_seqs: int,
        caching: bool,
        guesses: int = 0,
        drafts: bool = False,
    ) -> None:
        self.num_blocks = -(-num_tokens // block_size)
        self.size, self.budget, self.max_num_seqs = block_size, budget, max_num_seqs
        self.scheduler = Scheduler(
            BlockManager(self.num_blocks, block_size, caching),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            num_stages=num_stages,
            look_ahead=look_ahead,
        )
        self.guesses = guesses
        self.slots: dict[int, tuple[LogitsSpec, list[int]]] = {}
        self.num_accepted = self.num_copied = self.num_held_preempted = self.num_draft_steps = 0
        self.searches: list[tuple[BeamSearch, tuple[Any, ...]]] = []  # and how it began
        self.searching: list[BeamSearch] = []
        self.drawn: dict[int, tuple[int, ...]] = {}  # by each step
        self.looked_ahead = False
        self.known: dict[Sequence, list[int]] = {}  # to the ranks: with what was drawn and is not back
        self.sequences: list[Sequence] = []
        self.unasked: dict[Sequence, int] = {}
        self.cut: dict[Sequence, int] = {}  # ended from outside -> its output then
        self.flight: deque[tuple[ScheduledStep, StepOutput]] = deque()
        self.cache: dict[int, tuple[int, int]] = {}
        self.draft_cache: dict[int, tuple[int, int]] = {}
        if guesses:
            self.switch_speculation("a draft model" if drafts else "a drafter")

    @rule(
        prefix=st.integers(0, 8),
        tail=st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
        max_tokens=st.integers(0, 6),
        min_tokens=st.integers(0, 3),
        stops=st.sampled_from([frozenset[int](), frozenset({0})]),
        num_forced=st.sampled_from([0, 0, 2]),
        num_siblings=st.sampled_from([0, 0, 1, 2]),
        priority=st.sampled_from([0, 0, 1]),
        spec=st.sampled_from([None, LogitsSpec(presence_penalty=1.0), LogitsSpec(suppressed=(9,))]),
        asks=st.sampled_from(["", "", "logprobs", "hidden"]),
        num_unasked=st.integers(0, 12),
        ends_by=st.sampled_from(["", "", "grammar", "text", "processor"]),
    )
    def add(
        self,
        prefix: int,
        tail: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: frozenset[int],
        num_forced: int = 0,
        num_siblings: int = 0,
        priority: int = 0,
        spec: LogitsSpec | None = None,
        asks: str = "",
        num_unasked: int = 0,
        ends_by: str = "",
    ) -> None:
        if ends_by == "grammar":
            min_tokens, stops, num_forced = 0, frozenset(), 0
        prompt = [*([1, 2, 0, 1, 1, 2, 0, 0][:prefix]), *tail] or [1]
        siblings: list[Sequence] = []
        for seed in range(min(num_siblings, self.max_num_seqs - 1) if max_tokens else 0, -1, -1):
            sequence = Sequence(
                f"{ends_by} {len(self.sequences)}",
                list(prompt),
                max_tokens,
                min(min_tokens, max_tokens),
                stops,
                sample=SampleSpec(seed=seed),
                forced=(2,) * min(num_forced, max_tokens),
                logits=spec,
                constraint=Grammar(length=1 + max_tokens // 2) if ends_by == "grammar" else None,
                priority=priority,
                siblings=[] if seed else siblings[::-1],
                prompt_logprobs=0 if asks == "logprobs" and not seed else None,
                is_pooled=asks == "hidden" and not seed,
                num_asked=min(num_unasked, len(prompt) - 1) if asks and not seed else 0,
            )
            siblings.append(sequence)
            self.sequences.append(sequence)
            self.known[sequence] = list(prompt)
            self.unasked[sequence] = sequence.num_asked
        self.scheduler.add(sequence)

    @rule(
        prefix=st.integers(1, 8),
        num_beams=st.integers(2, 4),
        max_tokens=st.integers(1, 6),
        priority=st.sampled_from([0, 0, 1]),
    )
    def add_search(self, prefix: int, num_beams: int, max_tokens: int, priority: int = 0) -> None:
        if num_beams > self.max_num_seqs:
            return
        began = ([1, 2, 0, 1, 1, 2, 0, 0][:prefix], num_beams, max_tokens, priority)
        search = begin_search(*began)
        self.searches.append((search, began))
        self.searching.append(search)
        (root,) = search.sequences
        self.known[root] = list(root.token_ids)
        self.scheduler.add(root)

    def search_on(self, search: BeamSearch) -> None:
        beams, chosen = search.sequences, search.choose()
        if not chosen:
            self.end_search(search)
            return
        self.num_held_preempted += sum(beam.status is SequenceStatus.WAITING for beam in beams)
        heirs = self.scheduler.advance_beams(beams, [(c.beam, c.token_id) for c in chosen])
        search.follow(chosen, heirs)
        self.known |= {heir: list(heir.token_ids) for heir in heirs}

    def end_search(self, search: BeamSearch) -> None:
        self.searching.remove(search)
        for sequence in search.sequences:
            self.scheduler.finish(sequence, "abort")

    @precondition(lambda self: self.searching)
    @rule(data=st.data())
    def abort_search(self, data: st.DataObject) -> None:
        search = data.draw(st.sampled_from(self.searching))
        self.searches = [(other, began) for other, began in self.searches if other is not search]
        self.end_search(search)

    @precondition(lambda self: self.guesses)
    @rule(who=st.sampled_from(["a draft model", "a draft model", "a draft model", "a drafter", "nobody"]))
    def switch_speculation(self, who: str) -> None:
        while self.flight:
            self.complete()
        speculators = {"a drafter": Oracle(self.guesses), "a draft model": OracleModel(self.guesses, longest=16)}
        self.scheduler.speculate(speculators.get(who))

    @precondition(lambda self: len(self.flight) < self.scheduler.max_in_flight)
    @rule()
    def schedule(self) -> None:
        step = self.scheduler.schedule()
        if step is None:
            assert self.flight or not has_work(self.scheduler), "work to do, nothing in flight, and no step"
            return
        self.flight.append((step, self.execute(step)))

    def execute(self, step: ScheduledStep) -> StepOutput:
        """What the ranks do: copy blocks, write the new tokens to their slots, read each context by its table, draw."""
        given, start = step.input, 0
        before: list[tuple[int, ...]] = []  # of each token: those that it sees
        assert 0 < given.num_tokens <= self.budget
        for cache in (self.cache, self.draft_cache):
            cache |= {
                (to * self.size + i): cache[at * self.size + i]
                for at, to in given.copies
                for i in range(self.size)
                if at * self.size + i in cache
            }
        self.num_copied += len(given.copies)
        self.num_draft_steps += given.model
        cache = self.draft_cache if given.model else self.cache
        for sequence, count, context, table, drafts in zip(
            step.sequences, given.query_lens, given.context_lens, given.block_tables, step.drafts, strict=True
        ):
            known = [*self.known[sequence], *drafts, *(sequence.drafted if given.model else ())]
            self.looked_ahead |= given.token_ids[start] < 0
            tokens = [
                self.drawn[given.ahead_of][drawn_before(t)] if t < 0 else t
                for t in given.token_ids[start : start + count]
            ]
            start += count
            assert tokens == known[context : context + count]
            slots = [table[p // self.size] * self.size + p % self.size for p in range(context + count)]
            for position, token in zip(range(context, context + count), tokens, strict=True):
                cache[slots[position]] = (token, position)
            read = [cache[slot] for slot in slots]
            assert read == list(zip(known, range(context + count), strict=False)), "another's keys"
            before += [tuple(known[: p + 1]) for p in range(context, context + count)]
        assert start == given.num_tokens
        for update in given.histories:
            spec, tokens = self.slots.get(update.slot, (LogitsSpec(), []))
            more = [self.drawn[given.ahead_of][drawn_before(t)] if t < 0 else t for t in update.tokens]
            assert update.spec is None or not update.keep
            self.slots[update.slot] = (update.spec or spec, tokens[: update.keep] + more)
        drawers = [sequence for sequence, drafts in step.draws for _ in range(1 + len(drafts))]
        drawn: list[int] = []
        told: list[TokenLogprobs | None] = []
        errors: list[tuple[int, str]] = []
        masked = () if given.masks is None else given.masks.samples
        masks = dict(zip(masked, np.frombuffer(given.masks.words if given.masks else b"", np.int32), strict=True))
        for number, (sample, sequence) in enumerate(zip(given.samples, drawers, strict=True)):
            tokens_before = before[sample.row]
            assert len(tokens_before) == sample.position
            num_output = sample.position - sequence.num_prompt_tokens
            assert masks.get(number) == (None if sequence.constraint is None else num_output)
            if fails_after(sequence, tokens_before):
                errors.append((number, "failed"))
            if sequence.logits is not None:
                spec, tokens = self.slots[sample.settings.slot]
                assert spec is sequence.logits
                assert not spec.needs_history or tuple(tokens[: sample.position]) == tokens_before
            drawn.append((guess if given.model else draw)(sequence, tokens_before))
            told.append(likeliest(tokens_before) if sample.settings.num_candidates else None)
            assert sample.settings.forced in (-1, drawn[-1])
        if given.model:
            return StepOutput(given.step_id, tuple(drawn))
        first = 0
        for sequence, drafts in step.draws:
            for i in range(1 + len(drafts)):
                if i and drafts[i - 1] != drawn[first + i - 1]:
                    break
                if not sequence.num_candidates:
                    self.known[sequence].append(drawn[first + i])
            first += 1 + len(drafts)
        self.drawn[given.step_id] = tuple(drawn)
        while len(self.drawn) > self.scheduler.num_stages + 1:  # as `DrawnTokens`
            del self.drawn[min(self.drawn)]
        rows = [range(asked.row, asked.row + len(asked.targets)) for asked in given.given]
        return StepOutput(
            step_id=given.step_id,
            token_ids=tuple(drawn),
            logprobs=tuple(told),
            errors=tuple(errors),
            given=tuple(
                tuple(
                    TokenLogprobs(hash((before[row], target)), 1, (), ())
                    for row, target in zip(span, asked.targets, strict=True)
                )
                for span, asked in zip(rows, given.given, strict=True)
            ),
            pooled=tuple(bytes(len(before[row]) for row in range(pool.row, pool.stop)) for pool in given.pooled),
        )

    @precondition(lambda self: self.flight)
    @rule()
    def complete(self) -> None:
        step, output = self.flight.popleft()
        # Blocks of a step in flight belong to it until now, whatever happened to its sequences.
        given = step.input
        cache = self.draft_cache if given.model else self.cache
        for sequence, context, count, table, drafts in zip(
            step.sequences, given.context_lens, given.query_lens, given.block_tables, step.drafts, strict=True
        ):
            tokens = [*self.known[sequence][: context + count - len(drafts)], *drafts, *sequence.drafted]
            for p in range(context + count):
                slot = table[p // self.size] * self.size + p % self.size
                assert cache[slot] == (tokens[p], p), "overwritten while in flight"
        before = {s: s.num_output_tokens for s in self.sequences}
        grown = self.scheduler.update(step, output, heed)
        most = {s: 1 + len(drafts) for s, drafts in step.draws if not given.model}
        for s in self.sequences:
            gained = s.num_output_tokens - before[s]
            least = int(s.finish_reason != "error")
            assert least <= gained <= most[s] if s in grown and s.max_tokens else gained == 0
            self.num_accepted += max(0, gained - 1)
        for search in [search for search in self.searching if search.is_ready]:
            self.search_on(search)

    @precondition(lambda self: self.unended())
    @rule(data=st.data(), reason=st.sampled_from(["abort", "stop"]))
    def end_from_outside(self, data: st.DataObject, reason: str) -> None:
        sequence = data.draw(st.sampled_from(self.unended()))
        self.cut |= {s: s.num_output_tokens for s in (sequence, *sequence.siblings)}
        self.scheduler.finish(sequence, reason)
        assert sequence.finish_reason == reason

    def unended(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check()
        assert len(scheduler.running) <= self.max_num_seqs
        flying = [s for step, _ in self.flight for s in step.sequences]
        assert len(set(flying)) == len(flying) or scheduler.look_ahead
        assert all(s.is_in_flight == (s in flying) for s in self.sequences)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        turns = 0
        while has_work(self.scheduler) or self.flight:
            turns += 1
            assert turns < 5000, "no progress"
            before = len(self.flight)
            while len(self.flight) < self.scheduler.max_in_flight:
                self.schedule()
                if len(self.flight) == before:
                    break
                before = len(self.flight)
            if self.flight:
                self.complete()
            self.whole()
        assert self.scheduler.blocks.num_free_blocks == self.num_blocks
        assert not self.searching
        speculator = self.scheduler.speculator
        assert speculator is None or not (speculator._lengths or speculator._num_proposed), "ended ones are forgotten"
        assert not isinstance(speculator, DrafterSpeculator) or not speculator._num_known
        for search, began in self.searches:
            assert found_by(search) == search_alone(*began)
        for s in self.sequences:
            output, reason = alone(s)
            if s in self.cut:
                assert s.output_token_ids == output[: self.cut[s]]
            else:
                assert (s.output_token_ids, s.finish_reason) == (output, reason)
                self.answered(s)

    def answered(self, sequence: Sequence) -> None:
        """What was asked of its prompt came once, of each token in its place."""
        prompt, first = tuple(sequence.token_ids[: sequence.num_prompt_tokens]), self.unasked[sequence]
        after = range(first + 1, len(prompt)) if sequence.prompt_logprobs is not None else ()
        assert [score.logprob for score in sequence.prompt_scores] == [hash((prompt[:p], prompt[p])) for p in after]
        pooled = range(first + 1, len(prompt) + 1) if sequence.is_pooled else ()
        assert [length for part in sequence.pooled_parts for length in part] == list(pooled)


SchedulerMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSchedulerAsAWhole = SchedulerMachine.TestCase


@pytest.mark.parametrize(("num_stages", "look_ahead"), [(1, False), (1, True), (3, False), (2, True), (3, True)])
def test_the_simulation_does_preempt_and_hit_prefixes(num_stages: int, look_ahead: bool) -> None:
    """Guards the machine above: at its sizes, what it is to prove something about really happens."""
    machine = SchedulerMachine()
    machine.start(
        block_size=2,
        num_tokens=18,
        num_stages=num_stages,
        look_ahead=look_ahead,
        budget=16,
        max_num_seqs=6,
        caching=True,
    )
    for i in range(12):
        machine.add(prefix=5, tail=[i % 3, i // 3 % 3], max_tokens=6, min_tokens=6, stops=frozenset())
    sequences = machine.sequences
    machine.teardown()
    assert machine.scheduler.num_preemptions > 0
    assert machine.looked_ahead == look_ahead
    assert any(s.num_cached_tokens for s in sequences)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("num_stages", "look_ahead"), [(1, True), (2, False), (2, True)])
def test_the_simulation_does_guess(num_stages: int, look_ahead: bool, drafts: bool) -> None:
    """Likewise: drafts are right and wrong, while blocks are shared, copied and taken away."""
    machine = SchedulerMachine()
    machine.start(
        block_size=2,
        num_tokens=30,
        num_stages=num_stages,
        look_ahead=look_ahead,
        budget=16,
        max_num_seqs=5,
        caching=True,
        guesses=3,
        drafts=drafts,
    )
    for i in range(8):
        spec = LogitsSpec(presence_penalty=1.0) if i % 2 else None
        machine.add(5, [i % 3, i // 3 % 3], 6, 6, frozenset(), num_siblings=i % 3, spec=spec)
    machine.teardown()
    scheduler = machine.scheduler
    assert scheduler.num_preemptions > 0 and machine.num_copied > 0
    assert 0 < scheduler.num_accepted < scheduler.num_drafted
    assert (machine.num_draft_steps > 0) == drafts


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_simulation_does_share_blocks_and_preempt_beams(num_stages: int) -> None:
    machine = SchedulerMachine()
    machine.start(
        block_size=2,
        num_tokens=26,
        num_stages=num_stages,
        look_ahead=False,
        budget=16,
        max_num_seqs=8,
        caching=False,
    )
    for prefix in range(3, 9):
        machine.add_search(prefix=prefix, num_beams=4, max_tokens=6)
        machine.add(prefix=prefix, tail=[1], max_tokens=6, min_tokens=6, stops=frozenset())
    machine.teardown()
    assert machine.num_copied > 0 and machine.num_held_preempted > 0


@pytest.mark.parametrize(("num_stages", "look_ahead"), [(1, False), (1, True), (3, False), (2, True), (3, True)])
def test_the_simulation_does_accept_drafts_and_share_blocks(num_stages: int, look_ahead: bool) -> None:
    machine = SchedulerMachine()
    machine.start(
        block_size=4,
        num_tokens=60,
        num_stages=num_stages,
        look_ahead=look_ahead,
        budget=64,
        max_num_seqs=6,
        caching=True,
        guesses=3,
    )
    for priority in (1, 1, 0):
        spec = LogitsSpec(presence_penalty=1.0)
        machine.add(5, [1], 6, 0, frozenset(), num_forced=2, num_siblings=2, priority=priority, spec=spec)
    machine.teardown()
    assert machine.num_accepted > 0 and machine.num_copied > 0
    assert sum(s.num_accepted for s in machine.sequences) <= sum(s.num_drafted for s in machine.sequences)
