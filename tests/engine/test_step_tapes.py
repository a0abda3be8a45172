"""Steps on a CPU that are recorded as they run: which, and that their tokens are those without."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine.step_tapes import StepTapes
from meshlm.kernels import linear
from meshlm.kernels.cpu import Extent, Tape, Unavailable, VaryingTape
from meshlm.kernels.cpu.build import load_library
from meshlm.kernels.crossover import ROWS
from tiny import make_llama

try:
    load_library()
except Unavailable as reason:
    pytest.skip(f"nothing is recorded: {reason}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = InferenceConfig(device="cpu", dtype="float32", num_kv_blocks=96, block_size=4, max_num_batched_tokens=24)
PROMPTS = [[5, 6, 7], list(range(10, 40)), [99] * 9, [1], [4, 4, 8], [60, 2], [31] * 5]
PARAMS = [
    SamplingParams(temperature=0 if index % 2 else 0.8, seed=index, max_tokens=4 + 3 * index, ignore_eos=True)
    for index in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_llama(head_dim=16)


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM) -> list[Any]:
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=False)) as engine:
        assert tapes_of(engine) is None
        return run(engine)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[Tape]]:
    """How often each tape was replayed in this process."""
    seen: Counter[Tape] = Counter()
    replay = Tape.replay

    def spy(self: Tape) -> None:
        seen[self] += 1
        replay(self)

    monkeypatch.setattr(Tape, "replay", spy)
    yield seen


def tapes_of(engine: InferenceEngine) -> StepTapes | None:
    tapes: StepTapes | None = engine._world.executor.worker.runner.graphs  # type: ignore[attr-defined]
    return tapes


def run(engine: InferenceEngine) -> list[Any]:
    outputs = [output.token_ids for output in engine.generate(PROMPTS, PARAMS, progress=False)]
    engine.check()
    return outputs


def test_tokens_are_the_same(model: LlamaForCausalLM, expected: list[Any], replays: Counter[Tape]) -> None:
    """Twice: what is recorded in the one run is replayed from the first step in the other, on other blocks."""
    with InferenceEngine(model, CONFIG) as engine:
        assert run(engine) == expected
        first = sum(replays.values())
        assert run(engine) == expected
        tapes = tapes_of(engine)
        assert tapes is not None and tapes.spoiled is None and len(tapes) > 3
    assert first > 10 and sum(replays.values()) > 2 * first


def test_another_backend_or_cache_begins_anew(model: LlamaForCausalLM, expected: list[Any]) -> None:
    with InferenceEngine(model, CONFIG) as engine:
        assert run(engine) == expected
        engine.set_attention_backend("eager")
        assert tapes_of(engine) is None
        assert run(engine) == expected
        engine.set_attention_backend("cpu")
        assert tapes_of(engine) is not None and len(tapes_of(engine) or ()) == 0
        assert run(engine) == expected


def test_others_than_decodes_and_large_batches_are_not_recorded(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshlm.engine.worker.LARGEST", 2)
    with InferenceEngine(model, CONFIG) as engine:
        run(engine)
        tapes = tapes_of(engine)
        assert tapes is not None and set(tapes._recorded) == {1, 2}


@pytest.fixture
def prompts_replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each step that was replayed for another number of them."""
    seen: list[int] = []
    replay = VaryingTape.replay

    def spy(self: VaryingTape, extent: Extent, inputs: Any) -> list[Tensor | None]:
        seen.append(extent.num_tokens)
        return replay(self, extent, inputs)

    monkeypatch.setattr(VaryingTape, "replay", spy)
    yield seen


def test_steps_with_prompts_are_replayed_for_fewer_tokens(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, prompts_replayed: list[int]
) -> None:
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: ROWS[-1])  # all products by our own op
    config = CONFIG.replace(enable_prefix_caching=False)
    alone = [list(range(count)) for count in (9, 24, 2, 17, 24, 3)]
    each = lambda: [engine.generate(prompt, PARAMS[0], progress=False)[0].token_ids for prompt in alone]  # noqa: E731
    with InferenceEngine(model, config.replace(cuda_graphs=False)) as engine:
        expected, expected_alone = run(engine), each()
    with InferenceEngine(model, config) as engine:
        assert each() == expected_alone
        assert prompts_replayed == [2, 17, 24, 3], "recorded with 9 tokens, anew with 24"
        assert run(engine) == run(engine) == expected
        tapes = tapes_of(engine)
        assert tapes is not None and tapes._prompts is not None and tapes._prompts.most_tokens == 24
    assert len(prompts_replayed) > 8


def test_steps_whose_products_are_torchs_own_are_not(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, prompts_replayed: list[int]
) -> None:
    """Of many rows oneDNN's may be the faster one."""
    monkeypatch.setattr(linear, "streamed_rows", lambda *_: 8)
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=False)) as engine:
        expected = run(engine)
    with InferenceEngine(model, CONFIG) as engine:
        assert run(engine) == run(engine) == expected
        engine.generate([[1, 2, 3, 4]], PARAMS[0], progress=False)
        engine.generate([list(range(20))], PARAMS[0], progress=False)  # does not lose what was recorded with fewer
        prompts_replayed.clear()
        engine.generate([[4, 3, 2, 1]], PARAMS[0], progress=False)
        assert prompts_replayed == [4]
        tapes = tapes_of(engine)
        assert tapes is not None and tapes._most_tokens <= 12
        assert tapes._prompts is not None and tapes._prompts.most_tokens <= 8


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_meshes(sizes: dict[str, int], model: LlamaForCausalLM, expected: list[Any]) -> None:
    with InferenceEngine(model, CONFIG.replace(**sizes)) as engine:
        assert run(engine) == run(engine) == expected
