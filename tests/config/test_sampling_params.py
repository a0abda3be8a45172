import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from meshlm.config import ConfigError, SamplingParams, StructuredOutputsParams, as_sampling_params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "SamplingParams.temperature: -1 is not valid: must be in [0, 100]"),
        (
            {"temperature": math.nan},
            "SamplingParams.temperature: nan is not valid: must be a finite number, in [0, 100]",
        ),
        ({"top_p": 0}, "SamplingParams.top_p: 0 is not valid: must be in (0, 1]"),
        ({"top_p": 1.01}, "SamplingParams.top_p: 1.01 is not valid: must be in (0, 1]"),
        ({"top_p": math.nan}, "SamplingParams.top_p: nan is not valid: must be a finite number, in (0, 1]"),
        ({"min_p": 2}, "SamplingParams.min_p: 2 is not valid: must be in [0, 1]"),
        ({"top_k": -2}, "SamplingParams.top_k: -2 is not valid: must be in [0, 2147483647]"),
        ({"top_k": 2**31}, "SamplingParams.top_k: 2147483648 is not valid: must be in [0, 2147483647]"),
        ({"top_k": True}, "SamplingParams.top_k: True is not valid: must not be true or false"),
        ({"max_tokens": 0}, "SamplingParams.max_tokens: 0 is not valid: must be at least 1"),
        ({"min_tokens": 5, "max_tokens": 3}, "SamplingParams: min_tokens=5 is more than max_tokens=3"),
        ({"stop": ["a", ""]}, "SamplingParams.stop: ['a', ''] is not valid: must not hold an empty string"),
        ({"stop": 3}, "SamplingParams.stop: 3 is not valid: must be a list"),
        ({"stop": b"END"}, "SamplingParams.stop: b'END' is not valid: must be a list"),
        ({"suppress_tokens": "12"}, "SamplingParams.suppress_tokens: '12' is not valid: must be a list"),
        ({"stop_token_ids": [1, -1]}, "SamplingParams.stop_token_ids[1]: -1 is not valid: must be at least 0"),
        ({"stop_token_ids": [True]}, "SamplingParams.stop_token_ids[0]: True is not valid: must be an integer"),
        (
            {"stop": "END", "detokenize": False},
            "SamplingParams: stop=['END'] is looked for in the text, but detokenize=False makes none",
        ),
        ({"n": 0}, "SamplingParams.n: 0 is not valid: must be in [1, 16384]"),
        ({"best_of": 16385}, "SamplingParams.best_of: 16385 is not valid: must be in [1, 16384]"),
        ({"num_beams": 0}, "SamplingParams.num_beams: 0 is not valid: must be at least 1"),
        (
            {"early_stopping": "always"},
            "SamplingParams.early_stopping: 'always' is not valid: must be true, false or 'never'",
        ),
        ({"early_stopping": 1}, "SamplingParams.early_stopping: 1 is not valid: must be true, false or 'never'"),
        ({"length_penalty": math.inf}, "SamplingParams.length_penalty: inf is not valid: must be a finite number"),
        ({"repetition_penalty": 0}, "SamplingParams.repetition_penalty: 0 is not valid: must be greater than 0"),
        ({"presence_penalty": 2.1}, "SamplingParams.presence_penalty: 2.1 is not valid: must be in [-2, 2]"),
        ({"frequency_penalty": -3}, "SamplingParams.frequency_penalty: -3 is not valid: must be in [-2, 2]"),
        (
            {"no_repeat_ngram_size": -1},
            "SamplingParams.no_repeat_ngram_size: -1 is not valid: must be in [0, 2147483647]",
        ),
        ({"logprobs": -2}, "SamplingParams.logprobs: -2 is not valid: must be at least -1"),
        ({"logprobs": True}, "SamplingParams.logprobs: True is not valid: must not be true or false"),
        ({"prompt_logprobs": 1.5}, "SamplingParams.prompt_logprobs: 1.5 is not valid: must be an integer, at least -1"),
        ({"priority": "high"}, "SamplingParams.priority: 'high' is not valid: must be an integer"),
        (
            {"truncate_prompt_tokens": 0},
            "SamplingParams.truncate_prompt_tokens: 0 is not valid: must be at least 1, or -1 for as many as leave "
            "room for max_tokens",
        ),
        ({"allowed_token_ids": []}, "SamplingParams.allowed_token_ids: [] is not valid: must hold a token id"),
        ({"allowed_token_ids": [-1]}, "SamplingParams.allowed_token_ids[0]: -1 is not valid: must be at least 0"),
        ({"forced_token_ids": ()}, "SamplingParams.forced_token_ids: () is not valid: must hold a token id"),
        ({"suppress_tokens": 3}, "SamplingParams.suppress_tokens: 3 is not valid: must be a list"),
        (
            {"logit_bias": {5: 101}},
            "SamplingParams.logit_bias: {5: 101} is not valid: the bias of token 5 must be a number in [-100, 100]",
        ),
        (
            {"logit_bias": {"5": math.nan}},
            "SamplingParams.logit_bias: {'5': nan} is not valid: the bias of token 5 must be a number in [-100, 100]",
        ),
        ({"logit_bias": {"a": 1}}, "SamplingParams.logit_bias: {'a': 1} is not valid: 'a' is not a token id"),
        ({"logit_bias": {-1: 1}}, "SamplingParams.logit_bias: {-1: 1} is not valid: -1 is not a token id"),
        (
            {"logit_bias": [5]},
            "SamplingParams.logit_bias: [5] is not valid: must be a mapping of token ids to numbers",
        ),
        ({"bad_words": ["a", " "]}, "SamplingParams.bad_words: ['a', ' '] is not valid: must not hold an empty string"),
        (
            {"bad_words": [[]]},
            "SamplingParams.bad_words: [[]] is not valid: [] is neither a string nor a list of token ids",
        ),
        ({"bad_words": [[1, -1]]}, "SamplingParams.bad_words: [[1, -1]] is not valid: [1, -1] must hold token ids"),
        (
            {"bad_words": 7},
            "SamplingParams.bad_words: 7 is not valid: must be a list of strings, or of lists of token ids",
        ),
        ({"logits_processors": 7}, "SamplingParams.logits_processors: 7 is not valid: must hold callables, not int"),
        (
            {"logits_processors": [len]},
            f"SamplingParams.logits_processors: {[len]!r} is not valid: must hold callables of (prompt_token_ids, "
            "output_token_ids, logits)",
        ),
        (
            {"structured_outputs": 7},
            "SamplingParams.structured_outputs: 7 is not valid: must be StructuredOutputsParams, a dict of its fields "
            "or None, not int",
        ),
        ({"seed": -1}, "SamplingParams.seed: -1 is not valid: must be in [0, 9223372036854775807]"),
        ({"temprature": 1}, "SamplingParams.temprature: unknown field; the nearest known one is temperature"),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(**values)
    assert str(error.value) == message


def test_values_are_normalised_and_hashable() -> None:
    params = SamplingParams(top_k=-1, stop="END", stop_token_ids=[1, 2], eos_token_ids=[3])
    assert (params.top_k, params.stop, params.stop_token_ids, params.eos_token_ids) == (0, ("END",), (1, 2), (3,))
    assert hash(params) == hash(pickle.loads(pickle.dumps(params)))


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("logit_bias", {"7": -100, 3: 1}, {7: -100.0, 3: 1.0}),
        ("logit_bias", {}, {}),
        ("bad_words", "darn", ("darn",)),
        ("bad_words", ["darn", [3, 4], (5,)], ("darn", (3, 4), (5,))),
        ("allowed_token_ids", [3, 1], (3, 1)),
        ("early_stopping", True, True),
        ("early_stopping", "never", "never"),
        ("logprobs", -1, -1),
        ("truncate_prompt_tokens", -1, -1),
        ("priority", -5, -5),
        ("structured_outputs", {"regex": "a+"}, StructuredOutputsParams(regex="a+")),
        ("structured_outputs", StructuredOutputsParams(choice=["a"]), StructuredOutputsParams(choice=["a"])),
        ("logits_processors", max, (max,)),
    ],
)
def test_what_is_kept(name: str, given: Any, kept: Any) -> None:
    params = SamplingParams(**{name: given})
    assert getattr(params, name) == kept
    again = SamplingParams(**{name: getattr(params, name)})
    assert again == params == pickle.loads(pickle.dumps(params)) and hash(again) == hash(params)
    assert getattr(params.resolve(SamplingParams()), name) == kept


def test_none_is_left_out() -> None:
    params = SamplingParams(**dict.fromkeys(SamplingParams.model_fields))
    assert params == SamplingParams() and not params.model_fields_set
    with pytest.raises(ConfigError, match=r"^SamplingParams.stops: unknown field; the nearest known one is stop$"):
        SamplingParams(stops=None)


def test_numbers_of_numpy_are_numbers() -> None:
    one, half = np.int64(1), np.float32(0.5)
    params = SamplingParams(
        temperature=half, top_k=one, n=one, max_tokens=one, presence_penalty=half, stop_token_ids=[one],
        bad_words=[[one]], logit_bias={one: half}, include_stop_str_in_output=np.bool_(True),
    )  # fmt: skip
    assert {type(value) for value in params.model_dump().values()} <= {float, int, bool, tuple, dict, type(None)}
    assert (params.temperature, params.top_k, params.stop_token_ids, params.logit_bias) == (0.5, 1, (1,), {1: 0.5})
    assert isinstance(params.bad_words[0][0], int) and params.include_stop_str_in_output is True


GREEDY_MODEL = SamplingParams(temperature=0.0, eos_token_ids=[2])
SAMPLING_MODEL = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, max_tokens=64, eos_token_ids=[2, 3])

PENALISED_MODEL = SamplingParams(
    repetition_penalty=1.1, bad_words=[[5, 6]], suppress_tokens=[9], length_penalty=2.0, early_stopping=True
)
NEUTRAL = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "logit_bias": {},
    "bad_words": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "n": 1,
}
MAY_BE_NONE = {"seed", "max_total_tokens", "best_of", "allowed_token_ids", "structured_outputs", "forced_token_ids"} | {
    "logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
}


@pytest.mark.parametrize(
    ("given", "model", "expected"),
    [
        ({}, GREEDY_MODEL, {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 128}),
        ({}, SAMPLING_MODEL, {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "max_tokens": 64}),
        ({"top_p": 0.5}, GREEDY_MODEL, {"temperature": 1.0, "top_p": 0.5}),
        ({"top_p": 0.5}, SAMPLING_MODEL, {"temperature": 0.6, "top_p": 0.5, "top_k": 20}),
        ({"temperature": 0}, SAMPLING_MODEL, {"temperature": 0.0}),
        ({"temperature": 0, "top_k": 5}, GREEDY_MODEL, {"temperature": 0.0, "top_k": 5}),
        ({"temperature": None, "top_k": None}, SAMPLING_MODEL, {"temperature": 0.6, "top_k": 20}),
        ({"top_k": 0}, SAMPLING_MODEL, {"top_k": 0}),
        ({"eos_token_ids": [7]}, SAMPLING_MODEL, {"eos_token_ids": (7,)}),
        ({}, SamplingParams(), {"eos_token_ids": (), "temperature": 0.0}),
        # limits: the caller's replaces the model's, a default yields to what the caller asked for
        ({"max_tokens": 9}, SamplingParams(max_total_tokens=50), {"max_tokens": 9, "max_total_tokens": None}),
        ({}, SamplingParams(max_total_tokens=50), {"max_tokens": 128, "max_total_tokens": 50}),
        ({"max_total_tokens": 500}, SAMPLING_MODEL, {"max_tokens": 500, "max_total_tokens": 500}),
        ({"min_tokens": 200}, SAMPLING_MODEL, {"min_tokens": 200, "max_tokens": 200}),
        ({"max_tokens": 3}, SamplingParams(min_tokens=5), {"min_tokens": 3, "max_tokens": 3}),
        ({"max_total_tokens": 3}, SamplingParams(min_tokens=5), {"min_tokens": 2, "max_total_tokens": 3}),
        ({"detokenize": False}, SamplingParams(stop="END"), {"stop": ()}),
        ({"forced_token_ids": [1] * 200}, GREEDY_MODEL, {"max_tokens": 200}),
        ({"forced_token_ids": [1] * 200}, SAMPLING_MODEL, {"max_tokens": 200, "temperature": 0.6}),
        ({"structured_outputs": {"regex": "a"}}, SamplingParams(min_tokens=5), {"min_tokens": 0}),
        # what nobody speaks of changes nothing
        ({}, GREEDY_MODEL, NEUTRAL),
        ({}, PENALISED_MODEL, {"repetition_penalty": 1.1, "bad_words": ((5, 6),), "suppress_tokens": (9,)}),
        ({"repetition_penalty": 1.0}, PENALISED_MODEL, {"repetition_penalty": 1.0, "suppress_tokens": (9,)}),
        ({"bad_words": [], "suppress_tokens": None}, PENALISED_MODEL, {"bad_words": (), "suppress_tokens": (9,)}),
        # beams do not sample, even if the model does
        ({"num_beams": 3}, SAMPLING_MODEL, {"temperature": 0.0, "num_beams": 3, "length_penalty": 1.0}),
        ({"num_beams": 3, "n": 3}, PENALISED_MODEL, {"length_penalty": 2.0, "early_stopping": True, "n": 3}),
        ({"n": 2, "best_of": 4, "seed": 1}, SAMPLING_MODEL, {"temperature": 0.6, "n": 2, "best_of": 4}),
    ],
)
def test_resolve(given: dict[str, Any], model: SamplingParams, expected: dict[str, Any]) -> None:
    resolved = SamplingParams(**given).resolve(model)
    assert {name: getattr(resolved, name) for name in expected} == expected
    assert {name for name, value in resolved if value is None} <= MAY_BE_NONE
    assert resolved.resolve(PENALISED_MODEL) == resolved.resolve(SAMPLING_MODEL) == resolved


def test_as_sampling_params() -> None:
    params = SamplingParams(max_tokens=3)
    assert as_sampling_params(params) is params
    assert as_sampling_params(None) == SamplingParams()
    assert as_sampling_params({"max_tokens": 3}) == params
    assert as_sampling_params(GenerationConfig(max_new_tokens=3)) == params
    with pytest.raises(TypeError) as error:
        as_sampling_params(3)
    assert str(error.value) == "sampling params must be SamplingParams, GenerationConfig, a dict or None, not int"


def test_every_field_is_explained() -> None:
    document = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    rows = {line.split("|")[1].strip() for line in document.splitlines() if line.startswith("| `")}
    assert {f"`{name}`" for name in SamplingParams.model_fields} <= rows
