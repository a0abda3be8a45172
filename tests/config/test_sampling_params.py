import math
import pickle
from typing import Any

import pytest
from transformers import GenerationConfig

from meshlm.config import ConfigError, SamplingParams, as_sampling_params


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
        ({"top_k": -2}, "SamplingParams.top_k: -2 is not valid: must be at least 0"),
        ({"top_k": True}, "SamplingParams.top_k: True is not valid: must not be true or false"),
        ({"max_tokens": 0}, "SamplingParams.max_tokens: 0 is not valid: must be at least 1"),
        ({"min_tokens": 5, "max_tokens": 3}, "SamplingParams: min_tokens=5 is more than max_tokens=3"),
        ({"stop": ["a", ""]}, "SamplingParams.stop: ['a', ''] is not valid: must not hold an empty string"),
        ({"stop": 3}, "SamplingParams.stop: 3 is not valid: must be a list"),
        ({"stop_token_ids": [1, -1]}, "SamplingParams.stop_token_ids[1]: -1 is not valid: must be at least 0"),
        ({"stop_token_ids": [True]}, "SamplingParams.stop_token_ids[0]: True is not valid: must be an integer"),
        (
            {"stop": "END", "detokenize": False},
            "SamplingParams: stop=['END'] is looked for in the text, but detokenize=False makes none",
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


GREEDY_MODEL = SamplingParams(temperature=0.0, eos_token_ids=[2])
SAMPLING_MODEL = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, max_tokens=64, eos_token_ids=[2, 3])


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
        ({"detokenize": False}, SamplingParams(stop="END"), {"stop": ()}),
    ],
)
def test_resolve(given: dict[str, Any], model: SamplingParams, expected: dict[str, Any]) -> None:
    resolved = SamplingParams(**given).resolve(model)
    assert {name: getattr(resolved, name) for name in expected} == expected
    assert {name for name, value in resolved if value is None} <= {"seed", "max_total_tokens"}
    assert resolved.resolve(SAMPLING_MODEL) == resolved.resolve(GREEDY_MODEL) == resolved


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.1},
        ),
        ({"max_new_tokens": 8, "min_new_tokens": 2}, {"max_tokens": 8, "min_tokens": 2}),
        ({"max_length": 100}, {"max_total_tokens": 100}),
        ({"max_length": 100, "max_new_tokens": 8}, {"max_tokens": 8}),
        ({"stop_strings": "END"}, {"stop": ("END",)}),
        ({"eos_token_id": 2}, {"eos_token_ids": (2,)}),
        ({"eos_token_id": [2, 0]}, {"eos_token_ids": (2, 0)}),
        ({"use_cache": False, "pad_token_id": 1, "return_dict_in_generate": True, "num_beams": 1}, {}),
        ({"do_sample": False, "epsilon_cutoff": 0.1}, {"temperature": 0.0}),
    ],
)
def test_from_generation_config(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    params = SamplingParams.from_generation_config(GenerationConfig(**settings))
    assert params.model_dump(exclude_unset=True) == expected


def test_from_the_global_defaults_of_generate() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert SamplingParams.from_generation_config(GenerationConfig(**defaults)).temperature == 0.0
    assert SamplingParams.from_generation_config(GenerationConfig(do_sample=True)).top_k == defaults["top_k"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("bad_words_ids", [[1]]),
        ("min_length", 5),
        ("typical_p", 0.5),
        ("suppress_tokens", [4]),
        ("prompt_lookup_num_tokens", 3),
    ],
)
def test_an_unsupported_setting_is_refused_except_in_a_models_own_config(name: str, value: Any) -> None:
    config = GenerationConfig(do_sample=True, eos_token_id=2)
    setattr(config, name, value)
    with pytest.raises(ConfigError) as error:
        SamplingParams.from_generation_config(config)
    assert str(error.value) == f"GenerationConfig.{name}={value!r} is not supported"
    assert SamplingParams.from_generation_config(config, strict=False).eos_token_ids == (2,)


def test_a_models_own_config_never_raises() -> None:
    config = GenerationConfig(do_sample=True, top_p=0.9, max_new_tokens=4)
    config.temperature, config.min_new_tokens, config.eos_token_id = math.nan, 9, [-1]
    params = SamplingParams.from_generation_config(config, strict=False)
    assert params.model_dump(exclude_unset=True) == {"max_tokens": 4, "top_k": 50, "top_p": 0.9}


def test_an_unset_do_sample_is_the_models_decision() -> None:
    params = SamplingParams.from_generation_config(GenerationConfig(max_new_tokens=4))
    assert params.resolve(SAMPLING_MODEL).temperature == 0.6
    assert params.resolve(GREEDY_MODEL).temperature == 0.0
    assert SamplingParams.from_generation_config(GenerationConfig(top_k=9), strict=False).temperature == 0.0


def test_as_sampling_params() -> None:
    params = SamplingParams(max_tokens=3)
    assert as_sampling_params(params) is params
    assert as_sampling_params(None) == SamplingParams()
    assert as_sampling_params({"max_tokens": 3}) == params
    assert as_sampling_params(GenerationConfig(max_new_tokens=3)) == params
    with pytest.raises(TypeError) as error:
        as_sampling_params(3)
    assert str(error.value) == "sampling params must be SamplingParams, GenerationConfig, a dict or None, not int"
