"""A request with a seed gives the same tokens whatever goes on around it, however it is computed, and on every mesh."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from meshlm import InferenceEngine, RequestOutput

Tokens = list[tuple[int, ...]]
"""Those of each completion of each of `REQUESTS`, in their order."""

LONG = [5, 30, 2, 2, 17, 8, 5, 30, 2, 11, 29, 0, 4, 4, 23]  # 15 tokens: three blocks, and a part of one
SHORT = [7, 1, 36]
NUM_TOKENS = 12
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (prompt, {"max_tokens": NUM_TOKENS, **params})
    for prompt, params in (
        (LONG, {"temperature": 0.9, "seed": 11}),
        (SHORT, {"temperature": 1.1, "seed": 12, "top_k": 20, "top_p": 0.9}),
        (LONG, {"temperature": 1.2, "seed": 13, "min_p": 0.05}),
        (
            LONG,
            {
                "temperature": 1.0,
                "seed": 2**63 - 1,
                "repetition_penalty": 1.3,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.4,
                "no_repeat_ngram_size": 2,
                "top_p": 0.95,
            },
        ),
        (SHORT, {"temperature": 1.0, "seed": 15, "logit_bias": {3: 2.0}, "bad_words": [[5, 6], [7]], "logprobs": 2}),
        (LONG, {"temperature": 1.0, "seed": 16, "n": 2, "top_k": 25}),
        (SHORT, {"temperature": 1.3, "seed": 17, "n": 3, "presence_penalty": 1.0}),
    )
]
NUM_COMPLETIONS = 10
OTHERS: list[tuple[list[int], dict[str, Any]]] = [  # 32, of all lengths, some with the same beginnings and seeds
    (
        [*(LONG if number % 2 else SHORT), *range(number % 9)][: 3 + number % 16],
        {"temperature": number % 3 * 0.7, "seed": 11 + number, "max_tokens": 1 + number % 14, **params},
    )
    for number, params in enumerate([{}, {"top_k": 5}, {"repetition_penalty": 1.2}, {"n": 2, "logprobs": 1}] * 8)
]
for _, params in OTHERS:
    if params["temperature"] == 0:
        params.pop("n", None)


def tokens_of(outputs: Sequence[RequestOutput]) -> Tokens:
    assert all(output.finished and output.error is None for output in outputs)
    found = [completion.token_ids for output in outputs for completion in output.outputs]
    assert len(found) == NUM_COMPLETIONS
    return found


def generate(engine: InferenceEngine, requests: Sequence[tuple[list[int], dict[str, Any]]]) -> list[RequestOutput]:
    return engine.generate([p for p, _ in requests], [params for _, params in requests], progress=False)


# ---- ways to compute them -------------------------------------------------------------------------------------------


def alone(engine: InferenceEngine) -> Tokens:
    return tokens_of([output for request in REQUESTS for output in generate(engine, [request])])


def among_others(engine: InferenceEngine) -> Tokens:
    """Before, between and after 32 others."""
    mixed = [*OTHERS[:20], *REQUESTS[:4], *OTHERS[20:], *REQUESTS[4:]]
    outputs = generate(engine, mixed)
    return tokens_of([*outputs[20:24], *outputs[36:]])


def arriving_later(engine: InferenceEngine) -> Tokens:
    """One with each step, while others come, end, and are aborted."""
    finished: dict[str, RequestOutput] = {}
    for number, (prompt, params) in enumerate(REQUESTS):
        for place in range(3):
            engine.add_request(*OTHERS[3 * number + place], request_id=f"other {number} {place}")
        engine.add_request(prompt, params, request_id=str(number))
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        engine.abort(f"other {number} 1")
    while engine.has_unfinished():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
    return tokens_of([finished[str(number)] for number in range(len(REQUESTS))])


def streamed(engine: InferenceEngine) -> Tokens:
    last = {
        output.index: output for output in engine.stream([p for p, _ in REQUESTS], [params for _, params in REQUESTS])
    }
    return tokens_of([last[number] for number in range(len(REQUESTS))])


def with_cached_prefixes(engine: InferenceEngine) -> Tokens:
    """The prompts themselves, and what other samples made of them."""
    generate(engine, REQUESTS)
    outputs = generate(engine, REQUESTS)
    assert all(output.num_cached_tokens == len(output.prompt_token_ids) // 4 * 4 for output in outputs)
    return tokens_of(outputs)


def with_drafts(engine: InferenceEngine) -> Tokens:
    """Many of them right: the same outputs came before."""
    engine.enable_spec_decoding({"method": "suffix", "adaptive": False})
    try:
        for _ in range(2):
            outputs = generate(engine, REQUESTS)
        assert sum(output.num_accepted for output in outputs) > 0
    finally:
        engine.disable_spec_decoding()
    return tokens_of(outputs)


WAYS: dict[str, Callable[[InferenceEngine], Tokens]] = {
    way.__name__: way for way in (alone, among_others, arriving_later, streamed, with_cached_prefixes, with_drafts)
}


@pytest.fixture(scope="module")
def expected(start_tiny: Any) -> Tokens:
    """Each alone in an engine that has done nothing before."""
    found = []
    for request in REQUESTS:
        with start_tiny(max_num_seqs=3, enable_prefix_caching=False) as engine:
            found += [completion.token_ids for completion in generate(engine, [request])[0].outputs]
    assert len(set(found)) == NUM_COMPLETIONS and all(len(token_ids) == NUM_TOKENS for token_ids in found)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_on_every_mesh(tiny_engine: InferenceEngine, expected: Tokens, way: str) -> None:
    assert WAYS[way](tiny_engine) == expected


SETTINGS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 5},
    "few blocks": {"num_kv_blocks": 14, "max_num_seqs": 8, "max_model_len": 56},
    "blocks of one token": {"block_size": 1},
    "async scheduling": {"async_scheduling": True},
    "async scheduling, few blocks, chunks": {
        "async_scheduling": True,
        "num_kv_blocks": 14,
        "max_num_seqs": 8,
        "max_model_len": 56,
        "max_num_batched_tokens": 7,
    },
    "another seed of the engine": {"seed": 5},
}


@pytest.fixture(scope="module", params=SETTINGS)
def set_engine(request: pytest.FixtureRequest, start_tiny: Any) -> Iterator[InferenceEngine]:
    with start_tiny(**SETTINGS[request.param]) as engine:
        yield engine
        assert bool(engine.stats().num_preemptions) is ("few blocks" in request.param)


def test_however_it_is_computed(set_engine: InferenceEngine, expected: Tokens) -> None:
    for way in (among_others, arriving_later, streamed):
        assert way(set_engine) == expected, way.__name__


def test_another_seed_gives_other_tokens(tiny_local: InferenceEngine, expected: Tokens) -> None:
    """Guards the tests above: it is the seed that the tokens depend on."""
    reseeded = [(prompt, {**params, "seed": params["seed"] - 1}) for prompt, params in REQUESTS]
    found = tokens_of(generate(tiny_local, reseeded))
    assert all(one != other for one, other in zip(found, expected, strict=True))
