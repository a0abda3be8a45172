"""Snapshots of requests: what is made later is what there was when they were taken."""

import copy
import pickle
from dataclasses import asdict, replace

import pytest

from meshlm.engine.output import CompletionOutput, part, settle, snapshot


def completion(tokens: list[int]) -> CompletionOutput:
    """A snapshot of a sequence with a prompt of two tokens."""
    return snapshot(
        CompletionOutput,
        index=0,
        text="ab",
        _token_ids=(part, tokens, 2, len(tokens)),
        finish_reason=None,
        stop_reason=None,
        delta="b",
        logprobs=None,
        cumulative_logprob=None,
        error=None,
    )


def test_a_part_is_what_it_was_when_the_list_was_shorter() -> None:
    tokens = [1, 2, 30, 40]
    taken = completion(tokens)
    tokens.append(50)
    assert taken.token_ids == (30, 40)
    tokens.append(60)
    assert taken.token_ids is taken.token_ids and taken == CompletionOutput(0, "ab", (30, 40), None, delta="b")


def test_copies_are_whole_and_hold_nothing_that_grows() -> None:
    tokens = [1, 2, 30, 40]
    plain = CompletionOutput(0, "ab", (30, 40), None, delta="b")
    for copied in (
        pickle.loads(pickle.dumps(completion(tokens))),
        copy.copy(completion(tokens)),
        copy.deepcopy(completion(tokens)),
        replace(completion(tokens)),
    ):
        assert vars(copied) == vars(plain)
    assert asdict(completion(tokens)) == asdict(plain) and repr(completion(tokens)) == repr(plain)


def test_what_is_settled_lets_go_of_what_it_was_made_of() -> None:
    taken = completion([1, 2, 30, 40])
    settle(taken)
    assert vars(taken) == vars(CompletionOutput(0, "ab", (30, 40), None, delta="b"))


def test_one_of_a_class_derived_from_it_is_settled_as_well() -> None:
    class Derived(CompletionOutput):
        pass

    taken = snapshot(Derived, index=0, _token_ids=(part, [1, 2, 3], 1, 3))
    assert settle(taken) == {"index": 0, "token_ids": (2, 3)}


def test_a_field_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="CompletionOutput has no token_ids"):
        object.__new__(CompletionOutput).token_ids  # noqa: B018
    with pytest.raises(TypeError, match="token_ids"):
        CompletionOutput(0, "ab", finish_reason=None)  # type: ignore[call-arg]
