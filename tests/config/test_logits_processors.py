import pickle
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from meshlm.config import ConfigError, SamplingParams
from meshlm.config.logits_processors import TransformersProcessor


def three(prompt_token_ids: list[int], output_token_ids: list[int], logits: Any) -> Any:
    return logits


class Callable:
    def __call__(self, prompt: list[int], output: list[int], logits: Any, extra: int = 0) -> Any:
        return logits


def test_what_takes_three_arguments_is_kept_as_it_is() -> None:
    given = [three, Callable(), lambda *arguments: arguments[2]]
    assert SamplingParams(logits_processors=given).logits_processors == tuple(given)


@pytest.mark.parametrize("wrong", [lambda output, logits: logits, lambda a, b, c, d: a, "three", None, Callable])
def test_others_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError) as error:
        SamplingParams(logits_processors=[wrong])
    assert "\n" not in str(error.value) and "must hold callables" in str(error.value)


def test_those_of_transformers() -> None:
    processors = [RepetitionPenaltyLogitsProcessor(1.5), NoRepeatNGramLogitsProcessor(2)]
    kept = SamplingParams(logits_processors=LogitsProcessorList(processors)).logits_processors
    assert kept == tuple(map(TransformersProcessor, processors))
    prompt, output, logits = [3, 1, 4], [1, 5, 3], torch.randn(8, generator=torch.Generator().manual_seed(0))
    expected, changed = logits[None].clone(), logits.clone()
    for theirs, ours in zip(processors, pickle.loads(pickle.dumps(kept)), strict=True):
        expected = theirs(torch.tensor([prompt + output]), expected)
        changed = ours(prompt, output, changed)
    assert torch.equal(changed, expected[0]) and changed[1] == -torch.inf
    assert SamplingParams(logits_processors=processors[0]).logits_processors == kept[:1]
