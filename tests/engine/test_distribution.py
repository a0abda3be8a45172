"""Sampled tokens have the exact distribution, on every mesh: that of transformers' logits and warpers.

Pearson's chi-square. A right sampler would fail each check once in a million choices of seeds; the seeds are fixed, so
that it fails always or never. How small a mistake is seen is a test of its own.
"""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from meshlm import InferenceEngine

SIGNIFICANCE = 1e-6
FEWEST = 5.0  # draws that are expected of a cell; what is expected less often is one cell together
PROMPT = [94, 20, 98, 32, 75, 93, 23, 75]  # 45 of 101 tokens are likely, some of them its own

PARAMS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.2},
    "top-k": {"temperature": 2.5, "top_k": 7},
    "top-p": {"temperature": 1.5, "top_p": 0.8},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "all filters": {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "penalties": {
        "temperature": 1.5,
        "repetition_penalty": 1.4,
        "presence_penalty": 1.5,
        "frequency_penalty": -0.7,
        "top_p": 0.95,
    },
}


# ---- what is right --------------------------------------------------------------------------------------------------


def exact(model: LlamaForCausalLM, params: dict[str, Any], before: Sequence[Sequence[int]] = ((),)) -> Tensor:
    """Probabilities of the token after PROMPT and each of `before`, all of one length: float64 [len(before), vocab]."""
    token_ids = torch.tensor([[*PROMPT, *tokens] for tokens in before])
    with torch.no_grad():
        scores = model(token_ids).logits[:, -1].double()
    if "repetition_penalty" in params:
        scores = RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(token_ids, scores)
    for row, tokens in enumerate(before):  # of the other penalties transformers has none: as in OpenAI's API
        for token_id, count in Counter(tokens).items():
            scores[row, token_id] -= params.get("presence_penalty", 0) + count * params.get("frequency_penalty", 0)
    warpers: list[Any] = [TemperatureLogitsWarper(params["temperature"])]
    warpers += [TopKLogitsWarper(params["top_k"])] if "top_k" in params else []
    warpers += [TopPLogitsWarper(params["top_p"])] if "top_p" in params else []
    warpers += [MinPLogitsWarper(params["min_p"])] if "min_p" in params else []
    for warper in warpers:
        scores = warper(token_ids, scores)
    return scores.softmax(-1)


def p_value(drawn: Tensor, probabilities: Tensor) -> float:
    """How often as many draws are as far from their expectation as these, int64 [num_draws], or further."""
    seen = torch.bincount(drawn, minlength=len(probabilities)).double()
    if seen[probabilities == 0].any():
        return 0.0
    expected = probabilities * len(drawn)
    often = expected >= FEWEST
    seen = torch.cat((seen[often], seen[~often].sum(0, keepdim=True)))
    expected = torch.cat((expected[often], expected[~often].sum(0, keepdim=True)))
    seen, expected = seen[expected > 0], expected[expected > 0]
    assert len(expected) > 2
    statistic = ((seen - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(len(expected) - 1).double() / 2, statistic / 2))


def draws(engine: InferenceEngine, params: dict[str, Any], count: int, num_tokens: int = 1, n: int = 512) -> Tensor:
    """Of requests of n siblings each: int64 [count, num_tokens]."""
    params = {**params, "n": n, "max_tokens": num_tokens}
    prompts = [PROMPT] * (count // n)
    outputs = engine.generate(prompts, [{**params, "seed": seed} for seed in range(len(prompts))], progress=False)
    return torch.tensor([completion.token_ids for output in outputs for completion in output.outputs])


# ---- on every mesh --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMS)
def test_chi_square(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM, name: str) -> None:
    """The first token; and the second, which depends on the first, with it: the pairs are the cells."""
    params = PARAMS[name]
    drawn, vocab = draws(tiny_engine, params, 2048, num_tokens=2, n=16), tiny_model.config.vocab_size
    (first,) = exact(tiny_model, params)
    assert p_value(drawn[:, 0], first) > SIGNIFICANCE
    second = exact(tiny_model, params, [(token_id,) for token_id in range(vocab)])
    assert p_value(drawn[:, 0] * vocab + drawn[:, 1], (first.unsqueeze(1) * second).flatten()) > SIGNIFICANCE
    assert len(drawn[:, 0].unique()) > 4, "it was sampled"


def test_draws_are_independent(tiny_local: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    """Of siblings, of requests whose seeds are neighbours, one position apart too: no two are correlated."""
    count, params = 512, {"temperature": 1.0, "max_tokens": 2, "n": 8}
    outputs = tiny_local.generate([PROMPT] * count, [{**params, "seed": i} for i in range(count)], progress=False)
    drawn = torch.tensor([[c.token_ids for c in output.outputs] for output in outputs])  # [count, 8, 2]
    assert p_value(drawn[:, :, 0].flatten(), exact(tiny_model, params)[0]) > SIGNIFICANCE
    assert not correlated(drawn[:, :, 0], tiny_model)
    assert not correlated(drawn[:, :, 1], tiny_model)
    for one, next_one in ((0, 0), (0, 1), (1, 0)):  # positions
        neighbours = torch.stack((drawn[:-1, 0, one], drawn[1:, 0, next_one]), dim=1)
        assert not correlated(neighbours, tiny_model)


def correlated(drawn: Tensor, model: LlamaForCausalLM) -> list[tuple[int, int]]:
    """Pairs of the columns of int64 [count, n] that are. Of independent ones the measure is nearly normal, with a
    variance of 1; five of it come once in two million."""
    surprise = -exact(model, {"temperature": 1.0})[0].log()
    found = []
    for values in (surprise[drawn], drawn.double()):
        deviation = torch.corrcoef(values.T) * sqrt(len(drawn))
        found += [(i, j) for i, j in (deviation.abs() > 5).nonzero().tolist() if i < j]
    same = (drawn.unsqueeze(2) == drawn.unsqueeze(1)).double().mean(dim=0)  # how often two have the same token
    shares = torch.stack([torch.bincount(column, minlength=len(surprise)) / len(drawn) for column in drawn.T]).double()
    chance = shares @ shares.T
    deviation = (same - chance) / (chance * (1 - chance) / len(drawn)).sqrt()
    return found + [(i, j) for i, j in (deviation.abs() > 5).nonzero().tolist() if i < j]


# ---- what these tests see -------------------------------------------------------------------------------------------


# Whether the sampler errs or what is expected of it, is the same.


def test_a_temperature_that_is_5_percent_off_is_seen(tiny_local: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    params = PARAMS["plain"]
    drawn = draws(tiny_local, params, 20480)[:, 0]
    assert p_value(drawn, exact(tiny_model, params)[0]) > SIGNIFICANCE
    for factor in (0.95, 1.05):
        wrong = {**params, "temperature": factor * params["temperature"]}
        assert p_value(drawn, exact(tiny_model, wrong)[0]) < SIGNIFICANCE


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "one less in top-k": ("top-k", {"top_k": 6}),
    "two more in top-k": ("top-k", {"top_k": 9}),
    "top-p before temperature": ("top-p", {"temperature": 1.0}),
    "another min-p": ("min-p", {"min_p": 0.2}),
    "no repetition penalty": ("penalties", {"repetition_penalty": 1.0}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(tiny_local: InferenceEngine, tiny_model: LlamaForCausalLM, mistake: str) -> None:
    name, wrong = MISTAKES[mistake]
    drawn = draws(tiny_local, PARAMS[name], 2048)[:, 0]
    assert p_value(drawn, exact(tiny_model, PARAMS[name])[0]) > SIGNIFICANCE
    assert p_value(drawn, exact(tiny_model, {**PARAMS[name], **wrong})[0]) < SIGNIFICANCE


def test_noise_that_is_shared_is_seen(tiny_local: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    drawn = draws(tiny_local, PARAMS["plain"], 1024)[:, 0]
    others, (low, high) = drawn.roll(1), (drawn, drawn.roll(7))
    assert not correlated(torch.stack((drawn, others), dim=1), tiny_model)
    shared = torch.where(torch.arange(1024) % 4 == 0, low, high)  # a quarter of the draws
    assert correlated(torch.stack((drawn, shared), dim=1), tiny_model) == [(0, 1)] * 3
