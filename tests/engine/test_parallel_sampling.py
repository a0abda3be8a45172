"""Several outputs of one request: samples are what requests of their own would give, on blocks that they share."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from running import CUTS, PROMPT, one, running, syllables, told
from transformers import LlamaForCausalLM

from meshlm import InferenceEngine
from meshlm.config import ConfigError
from meshlm.engine.request import _SIBLING_SEED
from meshlm.engine.step import StepInput
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLED = {"temperature": 1.0, "seed": 11, "max_tokens": 9}
SHAPED = {**SAMPLED, "top_k": 30, "repetition_penalty": 1.3, "presence_penalty": 1.0, "logprobs": 2}
BEAMS = {"num_beams": 3, "n": 2, "max_tokens": 6, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return syllables()


@pytest.fixture(scope="module")
def shared(model: LlamaForCausalLM, tokenizer: Any) -> Iterator[InferenceEngine]:
    with running(model, tokenizer) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(shared: InferenceEngine) -> Callable[[dict[str, Any]], list[Any]]:
    """Four requests of one output each, with the seeds of the samples of one request."""
    seeds = [(11 + i * _SIBLING_SEED) % 2**63 for i in range(4)]
    return lambda params: [told(one(shared, {**params, "seed": seed}))[0] for seed in seeds]


@pytest.mark.parametrize("params", [SAMPLED, SHAPED], ids=["plain", "shaped"])
@pytest.mark.parametrize("cut", CUTS)
def test_samples_are_what_requests_of_their_own_give(
    model: LlamaForCausalLM, alone: Callable[[dict[str, Any]], list[Any]], cut: str, params: dict[str, Any]
) -> None:
    expected = alone(params)
    assert len({token_ids for token_ids, *_ in expected}) == 4
    with running(model, **CUTS[cut]) as engine:
        requests = [{**params, "n": 4}, {**params, "n": 2}]
        outputs = engine.generate([PROMPT] * 2, requests, progress=False)
        assert [told(output) for output in outputs] == [expected, expected[:2]]
        assert [c.index for c in outputs[0].outputs] == [0, 1, 2, 3]
        assert ("few" in cut) == (engine.stats().num_preemptions > 0)


MESHES = [
    {"tp_size": 2},
    {"pp_size": 2},
    pytest.param({"dp_size": 2}, marks=pytest.mark.slow),
    pytest.param({"tp_size": 2, "pp_size": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_on_every_mesh(shared: InferenceEngine, model: LlamaForCausalLM, mesh: dict[str, int]) -> None:
    """Samples and beams of several requests at once, with room for all and without."""
    requests = [{**SAMPLED, "n": 4}, {**SHAPED, "n": 3, "seed": 5}, BEAMS, {**BEAMS, "num_beams": 2}]
    prompts = [PROMPT, PROMPT[3:8], PROMPT, PROMPT[5:]]
    expected = [told(one(shared, params, prompt)) for params, prompt in zip(requests, prompts, strict=True)]
    with running(model, **mesh, num_kv_blocks=18) as engine:
        outputs = engine.generate(prompts, requests, progress=False)
        assert [told(output) for output in outputs] == expected
        assert "dp_size" in mesh or engine.stats().num_preemptions > 0


def test_blocks_are_shared_until_they_are_written(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(model, enable_prefix_caching=False) as engine:
        blocks, executor = engine._core.replicas[0].scheduler.blocks, engine._core.executor
        steps: list[tuple[int, int]] = []  # blocks held, blocks copied

        def submit(replica: int, step: StepInput, before: Any = executor.submit) -> None:
            steps.append((blocks.num_blocks - blocks.num_free_blocks, len(step.copies)))
            before(replica, step)

        monkeypatch.setattr(executor, "submit", submit)

        def cost(*requests: dict[str, Any]) -> tuple[int, int]:
            """Blocks held at most, and copied."""
            steps.clear()
            engine.generate([PROMPT] * len(requests), list(requests), progress=False)
            return max(held for held, _ in steps), sum(copies for _, copies in steps)

        assert cost(*[{**SAMPLED, "seed": seed} for seed in range(4)]) == (4 * 7, 0)
        assert cost({**SAMPLED, "n": 4}) == (4 + 4 * 3, 3), "four blocks of the prompt are full, the fifth is copied"
        held, copies = cost({"num_beams": 4, "max_tokens": 9})
        assert held <= 4 + 4 * 3 and copies >= 3


def test_best_of_gives_the_likeliest(shared: InferenceEngine) -> None:
    one(shared, {"max_tokens": 1})  # its blocks are kept: all below compute the same of the prompt, to the last bit
    all_of_them = one(shared, {**SAMPLED, "n": 5, "logprobs": 0})
    ranked = sorted(all_of_them.outputs, key=lambda c: -(c.cumulative_logprob or 0))
    best = one(shared, {**SAMPLED, "n": 2, "best_of": 5})
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in ranked[:2]]
    assert [(c.index, c.logprobs, c.cumulative_logprob) for c in best.outputs] == [(0, None, None), (1, None, None)]
    told_of = one(shared, {**SAMPLED, "n": 2, "best_of": 5, "logprobs": 1})
    assert [c.cumulative_logprob for c in told_of.outputs] == [c.cumulative_logprob for c in ranked[:2]]


def test_texts_grow_apart(shared: InferenceEngine) -> None:
    texts = ["", "", ""]
    for output in shared.stream(PROMPT, {**SAMPLED, "n": 3, "stop": ["pe"]}):
        for completion in output.outputs:
            texts[completion.index] += completion.delta
            assert completion.text == texts[completion.index]
    assert texts == [c.text for c in one(shared, {**SAMPLED, "n": 3, "stop": ["pe"]}).outputs]
    assert len(set(texts)) == 3 and output.finished


def test_best_of_is_told_in_the_end(shared: InferenceEngine) -> None:
    *before, last = shared.stream(PROMPT, {**SAMPLED, "n": 2, "best_of": 4})
    assert all(c.text == "" and c.finish_reason is None for output in before for c in output.outputs)
    assert len(last.outputs) == 2 and all(c.delta == c.text != "" for c in last.outputs)


def test_a_sample_fails_alone(shared: InferenceEngine) -> None:
    whole = one(shared, {**SAMPLED, "n": 4})
    second = list(whole.outputs[1].token_ids)

    def fail_at_the_third(prompt: Any, output: Any, logits: Any) -> Any:
        if list(output) == second[:2]:
            raise RuntimeError("enough of this")
        return logits

    failed = one(shared, {**SAMPLED, "n": 4, "logits_processors": [fail_at_the_third]})
    assert [c.finish_reason for c in failed.outputs] == ["length", "error", "length", "length"]
    assert "enough of this" in (failed.error or "") and failed.outputs[1].token_ids == tuple(second[:2])
    assert [told(failed)[i] for i in (0, 2, 3)] == [told(whole)[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("params", [{**SAMPLED, "n": 4}, {"num_beams": 4, "n": 3, "max_tokens": 9}], ids=["n", "beams"])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_all(shared: InferenceEngine, params: dict[str, Any], num_steps: int) -> None:
    request_id = shared.add_request(PROMPT, params)
    for _ in range(num_steps):
        shared.step()
    assert shared.abort(request_id)
    (output,) = shared.step()
    assert output.finished and {c.finish_reason for c in output.outputs} == {"abort"}
    assert len(output.outputs) == (params["n"] if num_steps or "seed" in params else 1)
    assert all(len(c.token_ids) == num_steps for c in output.outputs)
    stats = shared.stats().replicas[0]
    assert stats.num_free_blocks == stats.num_blocks
    shared.check()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({**SAMPLED, "n": 5}, r"n=5 is more than max_num_seqs=4"),
        ({**SAMPLED, "best_of": 9}, r"best_of=9 is more than max_num_seqs=4"),
        ({"num_beams": 5}, r"num_beams=5 is more than max_num_seqs=4"),
        ({"num_beams": 4, "max_tokens": 40}, r"num_beams=4 .* 17 prompt tokens and max_tokens=40 may need 44 blocks"),
    ],
)
def test_what_cannot_be_worked_on_together_is_refused(
    model: LlamaForCausalLM, params: dict[str, Any], message: str
) -> None:
    with running(model, max_num_seqs=4, num_kv_blocks=43) as engine:
        with pytest.raises(ConfigError, match=f"^prompts.1.: {message}.*$"):
            engine.generate([PROMPT] * 2, [SAMPLED, params], progress=False)
        assert not engine.has_unfinished()
        assert len(one(engine, {**SAMPLED, "n": 4}).outputs) == 4


def test_as_many_as_may_run_and_no_more(model: LlamaForCausalLM) -> None:
    """Requests that would not have all their places at once wait for each other."""
    requests: list[dict[str, Any]] = [
        {**SAMPLED, "n": 3},
        {"num_beams": 4, "max_tokens": 5},
        {**SAMPLED, "n": 2},
        SAMPLED,
    ]
    with running(model, max_num_seqs=4) as engine:
        expected = [told(one(engine, params)) for params in requests]
        assert [told(o) for o in engine.generate([PROMPT] * 4, requests, progress=False)] == expected
