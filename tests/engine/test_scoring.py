"""Log-probabilities, scores and embeddings through the engine are transformers', on several meshes.

Chunks are small, blocks few, prefixes cached: what was asked of a prompt comes out whole all the same.
"""

from collections.abc import Sequence
from math import exp
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, Logprob, RequestOutput, SamplingParams, logprob_dicts
from meshlm.engine.step import TokenLogprobs

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB_SIZE = 101
CLOSE = 1e-4  # of log-probabilities down to -40, in float32


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def log_softmax(model: LlamaForCausalLM, token_ids: Sequence[int]) -> Tensor:
    """float64 [num_tokens, vocab]: of what comes after each token."""
    with torch.inference_mode():
        return model(torch.tensor([list(token_ids)])).logits[0].double().log_softmax(dim=-1)


def check(told: Sequence[TokenLogprobs], expected: Tensor, token_ids: Sequence[int], top: int) -> None:
    """expected: [len(told), vocab]. Tokens that are as likely, as far as float32 tells, may change places."""
    assert len(told) == len(token_ids) == len(expected)
    top = VOCAB_SIZE if top < 0 else top
    for one, row, token_id in zip(told, expected, token_ids, strict=True):
        assert one.logprob == pytest.approx(row[token_id].item(), abs=CLOSE)
        assert (row > one.logprob + CLOSE).sum() < one.rank <= 1 + (row > one.logprob - CLOSE).sum()
        assert len(set(one.top_ids)) == len(one.top_logprobs) == top
        torch.testing.assert_close(torch.tensor(one.top_logprobs).double(), row[list(one.top_ids)], atol=CLOSE, rtol=0)
        torch.testing.assert_close(torch.tensor(one.top_logprobs).double(), row.topk(top).values, atol=CLOSE, rtol=0)


def check_output(output: RequestOutput, model: LlamaForCausalLM, params: SamplingParams) -> None:
    prompt = list(output.prompt_token_ids)
    for completion in output.outputs:
        expected = log_softmax(model, [*prompt, *completion.token_ids])
        if params.logprobs is None:
            assert completion.logprobs is None and completion.cumulative_logprob is None
        else:
            assert completion.logprobs is not None
            check(completion.logprobs, expected[len(prompt) - 1 : -1], completion.token_ids, params.logprobs)
            assert completion.cumulative_logprob == pytest.approx(sum(t.logprob for t in completion.logprobs))
    if params.prompt_logprobs is None:
        assert output.prompt_logprobs is None
    else:
        assert output.prompt_logprobs is not None
        first, *told = output.prompt_logprobs
        assert first is None
        check(told, expected[: len(prompt) - 1], prompt[1:], params.prompt_logprobs)


# ---- log-probabilities of generated tokens and of prompts -----------------------------------------------------------


def test_logprobs_in_a_mixed_batch(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    before = tiny_engine.stats().num_preemptions
    common = tokens(40, seed=0)
    prompts = [common[:n] for n in (1, 2, 13, 33, 40)] + [tokens(n, seed=n) for n in (5, 24, 25, 30, 40, 50, 60)]
    kinds: list[dict[str, Any]] = [
        {"logprobs": 0, "prompt_logprobs": 5},
        {"logprobs": 5, "temperature": 1.5, "top_p": 0.9},
        {"logprobs": -1, "prompt_logprobs": -1},
        {"prompt_logprobs": 0, "temperature": 1.0, "n": 2, "logprobs": 1},
        {"logprobs": 2, "repetition_penalty": 3.0, "suppress_tokens": [7, 8, 9]},
        {},
    ]
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **kinds[i % 6]}) for i in range(12)
    ]
    outputs = tiny_engine.generate(prompts, params, progress=False)
    for output, each in zip(outputs, params, strict=True):
        check_output(output, tiny_model, each)
    assert tiny_engine.stats().num_preemptions > before


def test_a_cached_prompt_is_computed_if_it_is_asked_about(
    tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM
) -> None:
    prompt = tokens(33, seed=80)
    kinds: list[tuple[dict[str, int], int]] = [({}, 0), ({"logprobs": 3}, 32), ({"prompt_logprobs": 3}, 0)]
    for values, num_cached in kinds:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, **values)
        (output,) = tiny_engine.generate(prompt, params, progress=False)
        check_output(output, tiny_model, params)
        assert output.num_cached_tokens == num_cached


def test_more_than_the_vocabulary_is_refused(tiny_engine: InferenceEngine) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=f"{name}=102 is more than the vocabulary's 101 tokens; -1 gives all"):
            tiny_engine.generate([1], {name: 102}, progress=False)


def test_forced_tokens_are_followed_and_scored(tiny_engine: InferenceEngine) -> None:
    """Whatever they are: an end token in their midst does not end them, nor is it too early for one."""
    prompt, forced = tokens(10, seed=1), (*tokens(37, seed=2), 3, 5, 3)
    common = {"logprobs": 3, "temperature": 1.0, "seed": 4, "stop_token_ids": [3], "min_tokens": 2, "max_tokens": 50}
    steps = sum(replica.num_steps for replica in tiny_engine.stats().replicas)
    (ended,) = tiny_engine.generate(prompt, {**common, "forced_token_ids": forced}, progress=False)
    assert sum(replica.num_steps for replica in tiny_engine.stats().replicas) - steps <= 6, "several tokens a step"
    assert (ended.token_ids, ended.finish_reason, ended.outputs[0].stop_reason) == (forced, "stop", 3)
    (scored,) = tiny_engine.score(prompt, forced, logprobs=3, progress=False)
    assert ended.outputs[0].logprobs is not None
    for one, other in zip(ended.outputs[0].logprobs, scored.logprobs, strict=True):
        assert (one.rank, one.top_ids) == (other.rank, other.top_ids)
        assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)

    forced = forced[:-1]
    common |= {"max_tokens": 45, "stop_token_ids": [], "ignore_eos": True}
    (going_on,) = tiny_engine.generate(prompt, {**common, "forced_token_ids": forced}, progress=False)
    common |= {"max_tokens": 6, "logprobs": None}
    (after,) = tiny_engine.generate([*prompt, *forced], common, progress=False)
    assert going_on.token_ids == (*forced, *after.token_ids) and len(after.token_ids) == 6


# ---- score ----------------------------------------------------------------------------------------------------------


def test_scores(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    texts = [tokens(n, seed=n) for n in (1, 2, 23, 24, 25, 50, 96)]
    stream = tiny_engine.stream(tokens(20, seed=90), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    begun = next(stream)
    outputs = tiny_engine.score(texts, logprobs=4, progress=False)
    assert list(stream)[-1].token_ids[: len(begun.token_ids)] == begun.token_ids
    for text, output in zip(texts, outputs, strict=True):
        assert output.token_ids == tuple(text)
        check(output.logprobs, log_softmax(tiny_model, text)[:-1], text[1:], 4)
        if len(text) > 1:
            loss = tiny_model(torch.tensor([text]), labels=torch.tensor([text])).loss.item()
            assert output.perplexity == pytest.approx(exp(loss), rel=1e-4)
            assert output.logprob == pytest.approx(-loss * (len(text) - 1), rel=1e-4)
    assert (outputs[0].logprob, outputs[0].perplexity, outputs[0].logprobs) == (0.0, 1.0, ())


def test_scores_of_continuations(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM) -> None:
    context, cached = tokens(50, seed=70), tiny_engine.stats().num_cached_tokens
    likeliest = log_softmax(tiny_model, context)[-1].argmax().item()
    continuations = [[likeliest], [4], [1, 2, 3], tokens(40, seed=71)]
    for _ in range(2):
        outputs = tiny_engine.score([context] * 4, continuations, progress=False)
        for continuation, output in zip(continuations, outputs, strict=True):
            assert output.token_ids == (*context, *continuation)
            expected = log_softmax(tiny_model, [*context, *continuation])[len(context) - 1 : -1]
            check(output.logprobs, expected, continuation, 0)
        assert [output.is_greedy for output in outputs] == [True, False, False, False]
    replicas = len(tiny_engine.stats().replicas)
    assert tiny_engine.stats().num_cached_tokens - cached >= 4 * 48 // replicas, "the context is computed once"


# ---- embed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings(tiny_engine: InferenceEngine, tiny_model: LlamaForCausalLM, normalize: bool) -> None:
    texts = [tokens(n, seed=n) for n in (1, 4, 23, 24, 25, 50, 96)]
    with torch.inference_mode():
        hidden = [tiny_model.model(torch.tensor([text])).last_hidden_state[0] for text in texts]
    for pooling, pool in {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}.items():
        outputs = tiny_engine.embed(texts, pooling, normalize, progress=False)
        for states, output in zip(hidden, outputs, strict=True):
            expected = pool(states)
            expected = expected / expected.norm() if normalize else expected
            torch.testing.assert_close(torch.tensor(output.embedding), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gemma2", "roberta"])
def test_embeddings_of_other_families(family: str) -> None:
    """A projection after the norm; another norm; and transformers' own layers."""
    model, text = families.tiny_model(family), tokens(9, seed=9)
    with InferenceEngine(model, InferenceConfig(device="cpu", block_size=4, num_kv_blocks=12)) as engine:
        (output,) = engine.embed(text, progress=False)
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([text]), position_ids=torch.arange(9)[None]).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(output.embedding), hidden.mean(dim=0), atol=2e-5, rtol=1e-5)


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_model: LlamaForCausalLM) -> Any:
    with InferenceEngine(tiny_model, InferenceConfig(device="cpu", block_size=4, num_kv_blocks=12)) as engine:
        yield engine


LONGEST = r"max_model_len=48 \(the KV cache has 12 blocks of 4\) is the most"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.score([1] * 49), f"text has 49 tokens; {LONGEST}"),
        (lambda e: e.score([[1], [2] * 40], [[1], [2] * 9]), rf"texts\[1\]: text has 49 tokens; {LONGEST}"),
        (lambda e: e.embed([[1] * 49, [1]], "first"), rf"texts\[0\]: text has 49 tokens; {LONGEST}"),
        (lambda e: e.score([[1], []]), r"texts\[1\]: text is empty: it must have at least one token"),
        (lambda e: e.score([1], [[]]), "continuation is empty: it must have at least one token"),
        (lambda e: e.score([[1], [2]], [[3]]), "continuations: 1 given for 2 texts; give one for each"),
        (lambda e: e.score([1], logprobs=102), "logprobs=102 is more than the vocabulary's 101 tokens; -1 gives all"),
        (lambda e: e.score([1], logprobs=-2), "SamplingParams.logprobs: -2 is not valid: must be at least -1"),
        (lambda e: e.score([101]), "prompt: token id 101 is out of range; the vocabulary has 0 to 100"),
        (lambda e: e.embed([1], "max"), "pooling='max': it must be 'mean', 'last' or 'first'"),
    ],
)
def test_what_cannot_be_scored(engine: InferenceEngine, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        call(engine)
    assert "\n" not in str(caught.value) and not engine.has_unfinished()


def test_nothing_is_nothing(engine: InferenceEngine) -> None:
    assert engine.score([]) == engine.embed([]) == []


def test_logprobs_as_dicts() -> None:
    told = TokenLogprobs(-3.0, 3, (7, 2), (-0.5, -1.0))
    letters = type("Letters", (), {"decode": lambda self, ids: "".join(chr(97 + i) for i in ids)})()
    likely = {7: Logprob(-0.5, 1, "h"), 2: Logprob(-1.0, 2, "c")}
    assert logprob_dicts([1, 5], [None, told], letters) == [None, {5: Logprob(-3.0, 3, "f"), **likely}]
    assert logprob_dicts([1, 7], [TokenLogprobs(-0.5, 1, (7, 2), (-0.5, -1.0))], letters) == [likely]
    assert logprob_dicts([5], [TokenLogprobs(-1.0, 2, (), ())]) == [{5: Logprob(-1.0, 2, None)}]
