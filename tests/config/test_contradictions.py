from typing import Any

import pytest

from meshlm.config import ConfigError, SamplingParams

REGEX = {"regex": "a+"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens=5 is more than max_tokens=3"),
        (
            {"min_tokens": 5, "max_total_tokens": 5},
            "min_tokens=5 is not below max_total_tokens=5, which counts the prompt too",
        ),
        (
            {"forced_token_ids": [1, 2, 3], "max_tokens": 2},
            "forced_token_ids has 3 tokens, but max_tokens=2 lets out fewer",
        ),
        (
            {"num_beams": 4, "temperature": 0.7},
            "num_beams=4 with temperature=0.7: beam search does not sample; give temperature=0, or num_beams=1",
        ),
        (
            {"num_beams": 4, "top_p": 0.9},
            "num_beams=4 with top_p=0.9: beam search does not sample; give temperature=0, or num_beams=1",
        ),
        (
            {"num_beams": 2, "n": 3},
            "n=3 is more than num_beams=2: beam search gives at most as many outputs as it has beams",
        ),
        (
            {"num_beams": 2, "best_of": 2},
            "best_of=2 with num_beams=2: beam search already gives the best of its beams; leave it out",
        ),
        ({"num_beams": 2, "logprobs": 0}, "num_beams=2 with logprobs is not supported; give num_beams=1"),
        (
            {"num_beams": 2, "forced_token_ids": [1]},
            "num_beams=2 with forced_token_ids is not supported; give num_beams=1",
        ),
        (
            {"num_beams": 2, "structured_outputs": REGEX},
            "num_beams=2 with structured_outputs is not supported; give num_beams=1",
        ),
        (
            {"n": 2, "best_of": 4, "temperature": 1},
            "best_of=4 without a seed: nobody could find out again what was left out; give a seed",
        ),
        ({"n": 3, "best_of": 2, "temperature": 1}, "best_of=2 is less than n=3, which are chosen from them"),
        (
            {"n": 3, "temperature": 0},
            "n=3 with temperature=0: greedy decoding gives the same output every time, whatever the seed; give a "
            "temperature above 0, or num_beams=3",
        ),
        (
            {"best_of": 3, "temperature": 0, "seed": 1},
            "best_of=3 with temperature=0: greedy decoding gives the same output every time, whatever the seed; give a "
            "temperature above 0, or num_beams=3",
        ),
        (
            {"n": 2, "forced_token_ids": [1]},
            "n=2 with forced_token_ids: every output would begin with the same; give n=1",
        ),
        (
            {"best_of": 2, "seed": 0, "forced_token_ids": [1]},
            "best_of=2 with forced_token_ids: every output would begin with the same; give best_of=1",
        ),
        (
            {"allowed_token_ids": [5, 6, 7], "suppress_tokens": [5], "bad_words": [[6]], "stop_token_ids": [7]}
            | {"min_tokens": 1},
            "allowed_token_ids=[5, 6, 7] are all banned by suppress_tokens, bad_words or min_tokens (end tokens); "
            "allow one more",
        ),
        (
            {"structured_outputs": REGEX, "forced_token_ids": [1]},
            "forced_token_ids with structured_outputs: both say what the output must be; give one",
        ),
        (
            {"structured_outputs": REGEX, "min_tokens": 3},
            "min_tokens=3 with structured_outputs: what is complete before could not end; give min_tokens=0",
        ),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**values)
    assert str(error.value) == f"SamplingParams: {message}"


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 4, "n": 4},
        {"num_beams": 4, "temperature": 0, "top_k": 5},  # idle, as in greedy decoding
        {"num_beams": 4, "top_p": 1.0, "top_k": -1, "min_p": 0},
        {"num_beams": 4, "repetition_penalty": 1.1, "stop": "END", "min_tokens": 2, "prompt_logprobs": 2},
        {"n": 3, "best_of": 3, "temperature": 0.5},
        {"n": 1, "best_of": 1, "temperature": 0},
        {"forced_token_ids": [1, 2], "max_tokens": 2, "n": 1, "best_of": 1, "logprobs": 0},
        {"allowed_token_ids": [5, 6], "suppress_tokens": [5]},
        {"allowed_token_ids": [5], "bad_words": ["a", [5, 6]]},
        {"allowed_token_ids": [7], "stop_token_ids": [7]},
        {"allowed_token_ids": [7], "eos_token_ids": [7], "ignore_eos": True, "min_tokens": 1},
        {"structured_outputs": REGEX, "n": 2, "temperature": 1, "logprobs": 3},
    ],
    ids=str,
)
def test_allowed(values: dict[str, Any]) -> None:
    SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "model", "message"),
    [
        ({"n": 2}, {}, "SamplingParams: n=2 with temperature=0: "),
        ({"allowed_token_ids": [2], "min_tokens": 1}, {"eos_token_ids": [2]}, "SamplingParams: allowed_token_ids=[2] "),
    ],
)
def test_what_shows_once_the_model_is_known(values: dict[str, Any], model: dict[str, Any], message: str) -> None:
    params = SamplingParams(**values)
    with pytest.raises(ConfigError) as error:
        params.resolve(SamplingParams(**model))
    assert str(error.value).startswith(message)
