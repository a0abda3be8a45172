import math
from typing import Any

import pytest
from transformers import GenerationConfig

from meshlm.config import ConfigError, SamplingParams

GREEDY_MODEL = SamplingParams(temperature=0.0, eos_token_ids=[2])
SAMPLING_MODEL = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, max_tokens=64, eos_token_ids=[2, 3])
BIAS_MESSAGE = (
    "SamplingParams.logit_bias: {5: -200.0} is not valid: the bias of token 5 must be a number in [-100, 100]"
)


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
        ({"use_cache": False, "pad_token_id": 1, "return_dict_in_generate": True}, {}),
        ({"num_beams": 1, "num_return_sequences": 1}, {"num_beams": 1, "n": 1}),
        ({"do_sample": True, "num_return_sequences": 3}, {"temperature": 1.0, "top_k": 50, "n": 3}),
        (
            {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": "never"},
            {"temperature": 0.0, "num_beams": 4, "n": 2, "length_penalty": 0.5, "early_stopping": "never"},
        ),
        (
            {"num_beams": 2, "top_k": 50, "early_stopping": True},
            {"temperature": 0.0, "num_beams": 2, "early_stopping": True},
        ),
        (
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        ),
        ({"bad_words_ids": [[5], [6, 7]]}, {"bad_words": ((5,), (6, 7))}),
        (
            {"suppress_tokens": [4], "begin_suppress_tokens": [5, 6]},
            {"suppress_tokens": (4,), "begin_suppress_tokens": (5, 6)},
        ),
        ({"sequence_bias": {(5,): -10.0, (6,): 2.0}}, {"logit_bias": {5: -10.0, 6: 2.0}}),
        ({"sequence_bias": [[[5], -10.0]]}, {"logit_bias": {5: -10.0}}),
        ({"renormalize_logits": True}, {}),
        # what only makes generating faster
        ({"prompt_lookup_num_tokens": 3, "num_assistant_tokens": 4, "assistant_early_exit": 4}, {}),
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


REFUSED: list[tuple[str, Any]] = [
    ("min_length", 5),
    ("typical_p", 0.5),
    ("num_beam_groups", 2),
    ("diversity_penalty", 0.5),
    ("penalty_alpha", 0.6),
    ("guidance_scale", 2.0),
    ("exponential_decay_length_penalty", (3, 1.1)),
    ("forced_bos_token_id", 1),
    ("forced_eos_token_id", 1),
    ("assistant_ensemble_weight", 0.5),
    ("max_time", 1.0),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_an_unsupported_setting_is_refused_except_in_a_models_own_config(name: str, value: Any) -> None:
    config = GenerationConfig(do_sample=True, eos_token_id=2)
    setattr(config, name, value)
    with pytest.raises(ConfigError) as error:
        SamplingParams.from_generation_config(config)
    assert str(error.value) == f"GenerationConfig.{name}={value!r} is not supported"
    assert SamplingParams.from_generation_config(config, strict=False).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sequence_bias": {(5, 6): -10.0}},
            "GenerationConfig.sequence_bias={(5, 6): -10.0} is not supported; single tokens may have a bias",
        ),
        (
            {"num_beams": 2, "renormalize_logits": True},
            "GenerationConfig.renormalize_logits=True is not supported",
        ),
        (
            {"num_beams": 2, "do_sample": True, "temperature": 0.5},
            "SamplingParams: num_beams=2 with temperature=0.5: beam search does not sample; give temperature=0, or "
            "num_beams=1",
        ),
        ({"sequence_bias": {(5,): -200.0}}, BIAS_MESSAGE),
    ],
)
def test_what_is_supported_in_part(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams.from_generation_config(GenerationConfig(**settings))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0}, {"length_penalty": 2.0}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"repetition_penalty": -1.0, "no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"suppress_tokens": [1, 2], "begin_suppress_tokens": [220]}, None),
        ({"bad_words_ids": [[5]]}, {"bad_words": ((5,),)}),
        ({"sequence_bias": {(5, 6): -10.0, (7,): 1.0}}, {"logit_bias": {7: 1.0}}),
    ],
)
def test_a_models_own_config(settings: dict[str, Any], expected: dict[str, Any] | None) -> None:
    """How many outputs or beams there are is left to the request."""
    params = SamplingParams.from_generation_config(GenerationConfig(**settings), strict=False)
    if expected is None:
        expected = {name: tuple(value) for name, value in settings.items()}
    assert params.model_dump(exclude_unset=True) == {"temperature": 0.0, **expected}


def test_a_models_own_config_never_raises() -> None:
    config = GenerationConfig(do_sample=True, top_p=0.9, max_new_tokens=4)
    config.temperature, config.min_new_tokens, config.eos_token_id = math.nan, 9, [-1]
    config.num_beams, config.sequence_bias, config.bad_words_ids, config.early_stopping = "4", [5], [[]], "soon"
    params = SamplingParams.from_generation_config(config, strict=False)
    assert params.model_dump(exclude_unset=True) == {"max_tokens": 4, "top_k": 50, "top_p": 0.9}


def test_an_unset_do_sample_is_the_models_decision() -> None:
    params = SamplingParams.from_generation_config(GenerationConfig(max_new_tokens=4))
    assert params.resolve(SAMPLING_MODEL).temperature == 0.6
    assert params.resolve(GREEDY_MODEL).temperature == 0.0
    assert SamplingParams.from_generation_config(GenerationConfig(top_k=9), strict=False).temperature == 0.0
