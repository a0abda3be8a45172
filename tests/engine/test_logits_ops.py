"""What requests ask of their logits, over simulated vocabulary shards: against transformers and a reference by rows."""

import pickle
import re
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from meshlm.engine import logits_rules
from meshlm.engine.histories import Histories
from meshlm.engine.logits_rules import LogitsRules
from meshlm.engine.logits_spec import LogitsSpec
from meshlm.engine.portable import Portable
from meshlm.engine.staging import Staging
from meshlm.engine.step import HistoryUpdate, drawn_before
from meshlm.shardformer.shard import Range
from shards import on_ranks, splits

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NEVER = float("-inf")
NOTHING_DRAWN = torch.zeros(8, dtype=torch.int64)


def update(histories: Histories, updates: Sequence[HistoryUpdate], drawn: Tensor = NOTHING_DRAWN) -> None:
    """A step's updates, by way of the arrays that go to a device."""
    writes = histories.plan(updates)
    staged = Staging(CPU).open(writes.shapes)
    writes.write(staged.host)
    histories.apply(writes, staged.send().arrays, drawn)


def ruled(
    logits: Tensor,
    specs: Sequence[LogitsSpec | None],
    before: Sequence[Sequence[int]],
    shards: Sequence[Range] | None = None,
) -> tuple[Tensor, list[tuple[int, str]]]:
    """Logits as they are drawn from, row by row with its spec and the tokens before it, and what failed."""
    shards = shards or [(0, logits.shape[1])]

    def rank(tp: Any) -> tuple[Tensor, list[tuple[int, str]]]:
        start, stop = shards[tp.rank]
        # The slots are others than the rows, and something is left in them.
        slots = [len(specs) - 1 - row for row in range(len(specs))]
        histories = Histories(len(specs), 2000, CPU)
        update(histories, [HistoryUpdate(slot, 0, array("q", [1] * 50), LogitsSpec()) for slot in slots])
        update(
            histories,
            [
                HistoryUpdate(slot, 0, array("q", ids), spec)
                for slot, spec, ids in zip(slots, specs, before, strict=True)
                if spec is not None
            ],
        )
        rules = LogitsRules(tp, shards, histories)
        rows = [(-1 if spec is None else s, len(ids)) for s, spec, ids in zip(slots, specs, before, strict=True)]
        plan = rules.plan(rows)
        staged = Staging(CPU).open(plan.shapes)
        plan.write(staged.host)
        local = logits[:, start:stop].clone()
        rules.apply(local, plan, staged.send().arrays)
        failures = rules.process(local, plan)
        assert plan.changes_logits or torch.equal(local, logits[:, start:stop])
        return local, failures

    results = on_ranks(len(shards), rank)
    assert not any(failures for _, failures in results[1:]), "the first rank tells"
    return torch.cat([local for local, _ in results], dim=1), results[0][1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---- a row at a time ------------------------------------------------------------------------------------------------


def reference(logits: Tensor, spec: LogitsSpec, before: Sequence[int]) -> Tensor:
    """One row, token by token, in numpy's float32."""
    out, number = logits.numpy().copy(), np.float32
    output = list(before[spec.num_prompt_tokens :])
    for token, bias in spec.bias:
        out[token] += number(bias)
    for token in {*before} & {*range(len(out))}:
        penalty = number(spec.repetition_penalty)
        out[token] = out[token] * penalty if out[token] < 0 else out[token] / penalty
        out[token] -= number(spec.frequency_penalty) * number(output.count(token))
        out[token] -= number(spec.presence_penalty) * number(token in output)
    banned = {word[-1] for word in spec.bad_words if tuple(before[len(before) + 1 - len(word) :]) == word[:-1]}
    size = spec.no_repeat_ngram_size
    if size and len(before) >= size:
        latest = list(before[len(before) + 1 - size :])
        banned |= {before[i] for i in range(size - 1, len(before)) if list(before[i + 1 - size : i]) == latest}
    banned |= set(spec.suppressed)
    banned |= set(spec.end_ids) if len(output) < spec.min_tokens else set()
    banned |= set(spec.begin_suppressed) if not output else set()
    banned |= set() if spec.allowed is None else set(range(len(out))) - set(spec.allowed)
    out[[token for token in banned if token < len(out)]] = NEVER
    return torch.from_numpy(out)


VOCAB = 23


def ids(**sizes: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, VOCAB - 1), **sizes).map(tuple)


RARE = st.one_of(st.just(()), ids(max_size=4))
PENALTY = st.sampled_from([0.0, 0.0, 0.3, -0.7, 2.0])
FEW = st.integers(0, 3)  # ids that come again and again


@st.composite
def rows(draw: st.DrawFn) -> tuple[LogitsSpec | None, list[int]]:
    before = draw(st.lists(st.one_of(FEW, st.integers(0, VOCAB + 4)), min_size=1, max_size=30))
    word = st.one_of(ids(min_size=1, max_size=3), st.lists(FEW, min_size=1, max_size=4).map(tuple))
    spec = LogitsSpec(
        num_prompt_tokens=draw(st.integers(1, len(before))),
        bias=tuple({i: draw(PENALTY) for i in draw(RARE)}.items()),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        presence_penalty=draw(PENALTY),
        frequency_penalty=draw(PENALTY),
        no_repeat_ngram_size=draw(st.sampled_from([0, 1, 2, 3, 4, 2**31 - 1])),
        bad_words=tuple(draw(st.lists(word, max_size=5))),
        min_tokens=draw(st.integers(0, 20)),
        end_ids=draw(RARE),
        allowed=draw(st.one_of(st.none(), st.none(), ids(min_size=1, max_size=6))),
        suppressed=draw(RARE),
        begin_suppressed=draw(RARE),
    )
    return draw(st.sampled_from([spec, spec, spec, None])), before


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=6), st.sampled_from(splits(VOCAB)), st.integers(0, 99))
def test_any_batch_on_any_shards_is_the_reference_row_by_row(
    batch: list[tuple[LogitsSpec | None, list[int]]], shards: list[Range], seed: int
) -> None:
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    specs, before = [spec for spec, _ in batch], [ids for _, ids in batch]
    found, _ = ruled(logits, specs, before, shards)
    for row, (spec, tokens) in enumerate(batch):
        expected = logits[row] if spec is None else reference(logits[row], spec, tokens)
        assert same_bits(found[row], expected), f"row {row}"


# ---- transformers ---------------------------------------------------------------------------------------------------

PROMPT = [5, 1, 2, 3, 1, 2, 9, 9, 5]
OUTPUT = [1, 2, 3, 7, 1, 2]
WORDS = ((4,), (2, 8), (1, 2, 6), (5, 2, 3), (8, 8))


def min_new_tokens(count: int) -> Any:
    return hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), count, [0, 11])


def bad_words() -> Any:
    return hf.NoBadWordsLogitsProcessor([list(word) for word in WORDS])


SAME: list[tuple[dict[str, Any], Callable[[], list[Any]]]] = [
    ({"repetition_penalty": 1.7}, lambda: [hf.RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"repetition_penalty": 0.6}, lambda: [hf.RepetitionPenaltyLogitsProcessor(0.6)]),
    *(
        ({"no_repeat_ngram_size": size}, lambda size=size: [hf.NoRepeatNGramLogitsProcessor(size)])  # type: ignore[misc]
        for size in (1, 2, 3, 4, 15, 16, 17)
    ),
    ({"bias": ((3, 1.5), (12, -4.0))}, lambda: [hf.SequenceBiasLogitsProcessor({(3,): 1.5, (12,): -4.0})]),
    ({"bad_words": WORDS}, lambda: [bad_words()]),
    ({"min_tokens": 7, "end_ids": (0, 11)}, lambda: [min_new_tokens(7)]),
    ({"min_tokens": 6, "end_ids": (0, 11)}, lambda: [min_new_tokens(6)]),
    ({"allowed": (2, 3, 5)}, lambda: [hf.PrefixConstrainedLogitsProcessor(lambda *_: [2, 3, 5], 1)]),
    ({"suppressed": (1, 2)}, lambda: [hf.SuppressTokensLogitsProcessor([1, 2])]),
    (
        {
            "bias": ((3, 1.5),),
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words": WORDS,
            "min_tokens": 7,
            "end_ids": (0, 11),
            "allowed": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
            "suppressed": (1,),
        },
        lambda: [
            hf.SequenceBiasLogitsProcessor({(3,): 1.5}),
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.NoRepeatNGramLogitsProcessor(3),
            bad_words(),
            min_new_tokens(7),
            hf.PrefixConstrainedLogitsProcessor(lambda *_: list(range(10)), 1),
            hf.SuppressTokensLogitsProcessor([1]),
        ],
    ),
]


@pytest.mark.parametrize(("values", "processors"), SAME, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_as_in_transformers(values: dict[str, Any], processors: Callable[[], list[Any]]) -> None:
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(0))
    spec = LogitsSpec(num_prompt_tokens=len(PROMPT), **values)
    expected = logits.clone()
    for processor in processors():
        expected = processor(torch.tensor([PROMPT + OUTPUT]), expected)
    for shards in splits(13):
        found, _ = ruled(logits, [spec], [PROMPT + OUTPUT], shards)
        assert torch.equal(found, expected)
    assert (
        not torch.equal(expected, logits) or values.get("min_tokens") == 6 or values.get("no_repeat_ngram_size", 0) > 3
    ), "guards this test"


def test_the_first_output_token() -> None:
    spec, logits = LogitsSpec(num_prompt_tokens=2, begin_suppressed=(3,)), torch.zeros(1, 5)
    assert ruled(logits, [spec], [[1, 2]])[0].tolist() == [[0, 0, 0, NEVER, 0]]
    assert ruled(logits, [spec], [[1, 2, 4]])[0].tolist() == [[0, 0, 0, 0, 0]]


def test_counts_are_of_the_output_alone_however_long_the_prompt() -> None:
    spec = LogitsSpec(num_prompt_tokens=1900, frequency_penalty=1.0, repetition_penalty=2.0)
    found, _ = ruled(torch.full((1, 4), 8.0), [spec], [[1] * 1000 + [2] * 900 + [1, 3, 1]])
    assert found.tolist() == [[8, 4 - 2, 4, 4 - 1]]


# ---- batches --------------------------------------------------------------------------------------------------------


def mixed(count: int, vocab: int) -> tuple[list[LogitsSpec | None], list[list[int]]]:
    """Rows with one op or several, and with none."""
    kinds: list[dict[str, Any] | None] = [
        {"repetition_penalty": 1.2},
        {"frequency_penalty": 0.3},
        None,
        {"no_repeat_ngram_size": 2, "presence_penalty": 0.1},
        {"bias": tuple((i, 0.1) for i in range(0, vocab, 7)), "bad_words": ((1,), (2, 3))},
        {"allowed": tuple(range(vocab // 2)), "repetition_penalty": 1.5, "frequency_penalty": -0.1},
        {},
    ]
    random = np.random.default_rng(1)
    specs, before = [], []
    for row in range(count):
        kind, length = kinds[row % len(kinds)], int(random.integers(1, 1500))
        specs.append(None if kind is None else LogitsSpec(num_prompt_tokens=length // 2 + 1, **kind))
        before.append(random.integers(0, vocab // 4, length).tolist())
    return specs, before


def test_rows_are_the_same_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(21, 700, generator=torch.Generator().manual_seed(2))
    specs, before = mixed(21, 700)
    together, _ = ruled(logits, specs, before, splits(700)[2])
    for row in range(21):
        alone, _ = ruled(logits[row : row + 1], specs[row : row + 1], before[row : row + 1])
        assert same_bits(alone[0], together[row])
        assert same_bits(alone[0], logits[row]) == (row % 7 in (2, 6)), "guards this test"
    monkeypatch.setattr(logits_rules, "_TOKENS_AT_ONCE", 2000)
    assert same_bits(ruled(logits, specs, before)[0], together)


def test_what_no_row_asks_for_costs_nothing() -> None:
    histories = Histories(3, 100, CPU)
    update(histories, [HistoryUpdate(slot, 0, array("q", [1, 2]), LogitsSpec(num_prompt_tokens=1)) for slot in (0, 1)])
    tp: Any = None

    def rank(tp: Any) -> None:
        rules = LogitsRules(tp, [(0, 10)], histories)
        for rows in ([(-1, 5), (-1, 7)], [(0, 2), (-1, 3), (1, 2)], []):
            plan = rules.plan(rows)
            assert not plan.shapes and not plan.spans and not plan.changes_logits
        assert not histories.plan([]).shapes

    assert on_ranks(1, rank) == [tp]


# ---- histories ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_histories_are_what_was_kept_and_what_came(data: st.DataObject) -> None:
    histories, expected = Histories(3, 3000, CPU), dict[int, list[int]]()
    for _ in range(data.draw(st.integers(1, 8))):
        updates, drawn = [], data.draw(st.lists(st.integers(0, 9), min_size=8, max_size=8))
        for slot in data.draw(st.lists(st.integers(0, 2), unique=True, max_size=3)):
            is_new = slot not in expected or data.draw(st.booleans())
            keep = 0 if is_new else data.draw(st.integers(0, len(expected[slot])))
            count = data.draw(st.sampled_from([0, 1, 3, 900, 1400]))
            tokens = data.draw(st.lists(st.integers(-8, 99), min_size=1, max_size=3)) * (count // 3 + 1)
            tokens = tokens[: min(count, 3000 - keep)]
            updates.append(HistoryUpdate(slot, keep, array("q", tokens), LogitsSpec() if is_new else None))
            known = [drawn[drawn_before(token)] if token < 0 else token for token in tokens]
            expected[slot] = [*expected.get(slot, [])[:keep], *known]
        update(histories, updates, torch.tensor(drawn))
        for slot, tokens in expected.items():
            assert histories.tokens[slot, : len(tokens)].tolist() == tokens
    assert histories.capacity <= 3000


def test_a_row_sees_the_tokens_before_it_alone() -> None:
    """Drafts lie in the history already, and rows of one sequence end at different ones."""
    histories = Histories(2, 100, CPU)
    spec = LogitsSpec(num_prompt_tokens=2, presence_penalty=1.0)
    update(histories, [HistoryUpdate(1, 0, array("q", [0, 1]), spec)])
    update(histories, [HistoryUpdate(1, 2, array("q", [2, drawn_before(3), 4]), None)], torch.tensor([9, 9, 9, 3]))

    def rank(tp: Any) -> list[list[float]]:
        rules = LogitsRules(tp, [(0, 6)], histories)
        plan, logits = rules.plan([(1, 3), (1, 4), (1, 5)]), torch.zeros(3, 6)
        rules.apply(logits, plan, {name: torch.from_numpy(value) for name, value in plan.values.items()})
        return logits.tolist()

    assert on_ranks(1, rank)[0] == [[0, 0, -1, 0, 0, 0], [0, 0, -1, -1, 0, 0], [0, 0, -1, -1, -1, 0]]


def test_a_slot_that_is_opened_anew_has_the_new_spec() -> None:
    histories = Histories(1, 100, CPU)

    def rank(tp: Any) -> list[list[int]]:
        rules, found = LogitsRules(tp, [(0, 9)], histories), []
        for token in (3, 5):
            update(histories, [HistoryUpdate(0, 0, array("q", [1]), LogitsSpec(suppressed=(token,)))])
            found.append(rules.plan([(0, 1)]).values["banned_places"].tolist())
        return found

    assert on_ranks(1, rank)[0] == [[3], [5]]


# ---- users' processors ----------------------------------------------------------------------------------------------


def prefers_the_next(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    logits[(prompt + output)[-1] + len(output)] = 50.0
    return logits


def test_processors_get_whole_rows_and_what_came_before() -> None:
    calls = []

    def record(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        calls.append((prompt, output, logits.clone()))
        return logits.double() * 2

    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    spec = LogitsSpec(num_prompt_tokens=2, suppressed=(4,), processors=(record, prefers_the_next))
    for shards in splits(10):
        calls.clear()
        found, failures = ruled(logits, [None, spec, None], [[1], [7, 2, 5], [1]], shards)
        assert not failures and same_bits(found[[0, 2]], logits[[0, 2]])
        assert len(calls) == 1 and calls[0][:2] == ([7, 2], [5])
        banned = logits[1].clone()
        banned[4] = NEVER
        assert torch.equal(calls[0][2], banned), "whatever bans tokens comes before"
        expected = 2 * banned
        expected[6] = 50
        assert torch.equal(found[1], expected)


def spoils_and_raises(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    logits.zero_()
    raise RuntimeError("no\nluck")


class Untold(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


def raises_what_cannot_be_told(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
    raise Untold


FAULTS: list[tuple[Callable[..., Any], str]] = [
    (spoils_and_raises, "raised RuntimeError: no luck"),
    (raises_what_cannot_be_told, r"raised .*Untold: <exception str\(\) failed>"),
    (lambda prompt, output, logits: logits.to("meta"), "raised "),
    (lambda prompt, output, logits: sys.exit("enough"), "raised SystemExit: enough"),
    (lambda prompt, output, logits: None, "returned NoneType: it must return the logits, a tensor"),
    (lambda prompt, output, logits: logits[1:], r"returned a tensor \[9\]: it must be \[10\]"),
    (lambda prompt, output, logits: logits * float("nan"), "returned logits that are NaN, or -inf throughout"),
    (lambda prompt, output, logits: logits.fill_(NEVER), "returned logits that are NaN, or -inf throughout"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_processor_that_fails_fails_its_row_alone(fault: Callable[..., Any], message: str) -> None:
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    good = LogitsSpec(num_prompt_tokens=1, processors=(prefers_the_next,))
    bad = LogitsSpec(num_prompt_tokens=1, processors=(prefers_the_next, fault))
    for shards in splits(10):
        found, failures = ruled(logits, [good, bad, good], [[2], [2], [3]], shards)
        assert [row for row, _ in failures] == [1]
        reason = failures[0][1]
        assert "\n" not in reason and re.match(r"SamplingParams.logits_processors\[1\] " + message, reason)
        assert same_bits(found[1], logits[1])
        assert found[0].argmax() == 2 and found[2].argmax() == 3


# ---- to other processes ---------------------------------------------------------------------------------------------


def test_a_callable_defined_anywhere_can_be_sent() -> None:
    factor = 3.0
    scale = Portable(lambda prompt, output, logits: logits * factor, "SamplingParams.logits_processors[0]")
    spec = pickle.loads(pickle.dumps(LogitsSpec(num_prompt_tokens=1, processors=(scale,))))
    assert pickle.loads(pickle.dumps(spec)) is not None, "it can be sent on before it was called"
    logits = torch.randn(1, 5)
    assert torch.equal(ruled(logits, [spec], [[1]])[0], logits * 3)


def test_what_cannot_be_sent_is_refused_by_name() -> None:
    lock = threading.Lock()
    holder = Portable(lambda *_: lock, "SamplingParams.logits_processors[2]")
    with pytest.raises(ValueError, match=r"^SamplingParams.logits_processors\[2\]: .* cannot be sent .*lock.*$"):
        _ = holder.pickled
    assert holder() is lock, "in this process it works"


def _raise(message: str) -> None:
    raise ValueError(message)


class Unwanted:
    """Goes, but does not arrive."""

    def __call__(self, *_: Any) -> None: ...

    def __reduce__(self) -> Any:
        return _raise, ("it is not installed here",)


def test_what_does_not_arrive_fails_when_it_is_called() -> None:
    spec = LogitsSpec(num_prompt_tokens=1, processors=(Portable(Unwanted(), "SamplingParams.logits_processors[0]"),))
    received = pickle.loads(pickle.dumps(spec))
    (row, reason), *rest = ruled(torch.zeros(1, 4), [received], [[1]])[1]
    assert row == 0 and not rest
    assert reason == "SamplingParams.logits_processors[0] raised ValueError: it is not installed here"
