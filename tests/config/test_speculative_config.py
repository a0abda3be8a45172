import pickle
from pathlib import Path
from typing import Any

import pytest

from meshlm.config import ConfigError, SpeculativeConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "eagle"},
            "SpeculativeConfig.method: 'eagle' is not valid: must be one of 'ngram', 'suffix' or 'draft_model'",
        ),
        (
            {"num_speculative_tokens": 0},
            "SpeculativeConfig.num_speculative_tokens: 0 is not valid: must be in [1, 16]",
        ),
        (
            {"num_speculative_tokens": True},
            "SpeculativeConfig.num_speculative_tokens: True is not valid: must not be true or false",
        ),
        (
            {"suffix_min_probability": 0},
            "SpeculativeConfig.suffix_min_probability: 0 is not valid: must be in (0, 1]",
        ),
        (
            {"suffix_max_cached_tokens": -1},
            "SpeculativeConfig.suffix_max_cached_tokens: -1 is not valid: must be at least 0",
        ),
        ({"model": 3, "method": "draft_model"}, "SpeculativeConfig.model: 3 is not valid: must be a string"),
        (
            {"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 3},
            "SpeculativeConfig: prompt_lookup_min=5 is more than prompt_lookup_max=3",
        ),
        (
            {"method": "draft_model"},
            "SpeculativeConfig: method='draft_model' needs the path of a smaller model, and model=None",
        ),
        ({"model": "small"}, "SpeculativeConfig: model='small' needs method='draft_model', not 'suffix'"),
        (
            {"prompt_lookup_max": 3},
            "SpeculativeConfig: prompt_lookup_max=3 needs method='ngram', not 'suffix'",
        ),
        (
            {"method": "ngram", "suffix_max_cached_tokens": 9},
            "SpeculativeConfig: suffix_max_cached_tokens=9 needs method='suffix', not 'ngram'",
        ),
        (
            {"num_speculative_token": 3},
            "SpeculativeConfig.num_speculative_token: unknown field; the nearest known one is num_speculative_tokens",
        ),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SpeculativeConfig(**values)
    assert str(error.value) == message


def test_a_config_can_be_taken_apart_and_put_together_again() -> None:
    config = SpeculativeConfig(method="draft_model", model=Path("small"))  # type: ignore[arg-type]
    assert config.model == "small"
    assert SpeculativeConfig(**dict(config)) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(SpeculativeConfig(**dict(config)))
