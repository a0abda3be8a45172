"""Decode steps on a CPU that are recorded as they run: which, and that their tokens are those without."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine.decode_tapes import DecodeTapes
from meshlm.kernels.cpu import Tape, Unavailable
from meshlm.kernels.cpu.build import load_library
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


def tapes_of(engine: InferenceEngine) -> DecodeTapes | None:
    tapes: DecodeTapes | None = engine._world.executor.worker.runner.graphs  # type: ignore[attr-defined]
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


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_meshes(sizes: dict[str, int], model: LlamaForCausalLM, expected: list[Any]) -> None:
    with InferenceEngine(model, CONFIG.replace(**sizes)) as engine:
        assert run(engine) == run(engine) == expected
