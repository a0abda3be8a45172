"""Decode steps from recordings. Without a GPU nothing is recorded: the function is run again, on the same static
buffers, so that all but CUDA's own part is tried here: sizes, padding, metadata, stages, rebinding."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from meshlm import ConfigError, InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine.cuda_graphs import DecodeGraphs, ladder
from meshlm.engine.step import StepInput
from meshlm.kernels.cpu import Unavailable
from meshlm.kernels.cpu.build import load_library
from tiny import make_llama

try:
    load_library()
except Unavailable as reason:
    pytest.skip(f"no backend here can be captured: {reason}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = InferenceConfig(
    device="cpu", dtype="float32", num_kv_blocks=96, block_size=4, max_num_batched_tokens=24, max_num_seqs=11
)
SIZES = (11, 8, 4, 2, 1)  # of which 3, 5, 6, 7, 9 and 10 lie between
PROMPTS = [[5, 6, 7], list(range(10, 40)), [99] * 9, [1], [4, 4, 8], [60, 2], [31] * 5, [77, 3, 9], [8] * 17, [50]]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def length(index: int) -> int:
    """Of an output: all differ."""
    return 6 + 3 * index


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Query heads that share a KV head, 12 at a time, take the C++ kernel's form for many rows: see `few`."""
    return make_llama(head_dim=16)


@pytest.fixture(scope="module")
def expected(model: LlamaForCausalLM) -> list[list[int]]:
    outputs = []
    for index, prompt in enumerate(PROMPTS):
        made = model.generate(torch.tensor([prompt]), max_new_tokens=length(index), do_sample=False, pad_token_id=0)
        outputs.append(made[0, len(prompt) :].tolist())
    assert sum(len(set(output)) > 5 for output in outputs) > 7, "outputs too plain to prove anything"
    return outputs


def run(engine: InferenceEngine, between: Callable[[int], None] = lambda step: None) -> list[list[int]]:
    """The prompts' outputs: three at once, the others one after each step, so that the batch grows and shrinks."""
    finished: dict[str, list[int]] = {}
    waiting = list(enumerate(PROMPTS))
    number = 0
    while waiting or engine.has_unfinished():
        for index, prompt in waiting[: 1 if number else 3]:
            engine.add_request(prompt, greedy(length(index)), request_id=str(index))
        del waiting[: 1 if number else 3]
        finished.update((o.request_id, list(o.token_ids)) for o in engine.step() if o.finished)
        between(number)
        number += 1
    engine.check()
    return [finished[str(index)] for index in range(len(PROMPTS))]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[int, int]]]:
    """(sequences, size) of the steps that are replayed in this process."""
    seen: Counter[tuple[int, int]] = Counter()
    size_for = DecodeGraphs.size_for

    def spy(self: DecodeGraphs, step: StepInput) -> int | None:
        size = size_for(self, step)
        if size is not None:
            seen[len(step.query_lens), size] += 1
        return size

    monkeypatch.setattr(DecodeGraphs, "size_for", spy)
    yield seen


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (3, (3, 2, 1)), (4, (4, 2, 1)), (9, (9, 8, 4, 2, 1)), (24, (24, 16, 8, 4, 2, 1)), (11, SIZES)],
)
def test_the_ladder(most: int, sizes: tuple[int, ...]) -> None:
    assert ladder(most) == sizes


def test_the_ladder_ends() -> None:
    assert len(ladder(256)) == 35 and ladder(256)[0] == 256 and ladder(100_000) == ladder(512)
    assert len(ladder(512)) == 51 and ladder(512)[:3] == (512, 496, 480)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_tokens_are_the_same(
    async_scheduling: bool,
    model: LlamaForCausalLM,
    expected: list[list[int]],
    replays: Counter[tuple[int, int]],
) -> None:
    config = CONFIG.replace(cuda_graphs=True, async_scheduling=async_scheduling)
    with InferenceEngine(model, config) as engine:
        assert engine.ranks[0].graph_sizes == SIZES and engine.ranks[0].graph_bytes == 0
        assert "CUDA graphs" in engine.describe() and "5 (0 MiB)" in engine.describe()
        assert run(engine) == expected
    assert all(size == min(s for s in SIZES if s >= count) for count, size in replays)
    assert {size for _, size in replays} == set(SIZES) and len({count for count, _ in replays}) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"pp_size": 2}, {"tp_size": 2}], ids=str)
def test_meshes(sizes: dict[str, int], model: LlamaForCausalLM, expected: list[list[int]]) -> None:
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=True, **sizes)) as engine:
        assert all(rank.graph_sizes == SIZES for rank in engine.ranks)
        assert run(engine) == expected


@pytest.mark.slow  # interpreted
def test_triton(model: LlamaForCausalLM, expected: list[list[int]]) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: test_on_a_gpu runs them")
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=True, attention_backend="triton")) as engine:
        assert engine.ranks[0].graph_sizes == SIZES
        outputs = engine.generate(PROMPTS[:5], greedy(5), progress=False)
    assert [list(o.token_ids) for o in outputs] == [output[:5] for output in expected[:5]]


@pytest.mark.cuda
def test_on_a_gpu(model: LlamaForCausalLM, expected: list[list[int]], replays: Counter[tuple[int, int]]) -> None:
    """Needs a GPU: recorded, and with the tokens of each step taken by the next on the device."""
    with InferenceEngine(model, CONFIG.replace(device="cuda:0", attention_backend="triton")) as engine:
        assert engine.ranks[0].graph_sizes == SIZES
        assert run(engine) == expected
        assert replays
        engine.set_attention_backend("eager")
        assert engine.ranks[0].graph_sizes == ()
        engine.set_attention_backend("triton")
        assert engine.ranks[0].graph_sizes == SIZES
        assert run(engine) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("graphs", [True, False])
def test_a_step_is_launched_without_waiting(
    graphs: bool, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs a GPU: prompts, decodes, banned tokens and random draws; torch raises where the host would wait."""
    config = CONFIG.replace(device="cuda:0", attention_backend="triton", cuda_graphs=graphs)
    params = [SamplingParams(temperature=t, max_tokens=8, min_tokens=4, seed=1) for t in (0.0, 1.0, 0.0, 1.0, 0.0)]
    with InferenceEngine(model, config) as engine:
        before = engine.generate(PROMPTS[:5], params, progress=False)  # compiles
        runner = engine._world.executor.worker.runner
        launch = runner.launch

        def strict(step: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(runner, "launch", strict)
        after = engine.generate(PROMPTS[:5], params, progress=False)
        assert [o.token_ids for o in after] == [o.token_ids for o in before]


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"pp_size": 2, "tp_size": 2}, marks=pytest.mark.slow)], ids=["one rank", "four ranks"]
)
def test_another_backend_is_recorded_anew(
    sizes: dict[str, int], model: LlamaForCausalLM, expected: list[list[int]]
) -> None:
    """While sequences are under way, whose keys recording must not touch. Eager cannot be recorded."""
    names = ["eager", "cpu", "cpu"]
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=True, **sizes)) as engine:

        def rebind(step: int) -> None:
            if step % 4 == 3:
                name = names[step // 4 % len(names)]
                engine.set_attention_backend(name)
                graphs = () if name == "eager" else SIZES
                assert all(rank.graph_sizes == graphs for rank in engine.ranks)
                assert ("CUDA graphs" in engine.describe_mesh()) == bool(graphs)

        assert run(engine, rebind) == expected


def test_a_larger_group_of_heads() -> None:
    """12 query heads of one KV head: another form of the C++ kernel."""
    model = make_llama(num_attention_heads=12, num_key_value_heads=1, head_dim=16)
    outputs = []
    for cuda_graphs in (False, True):
        with InferenceEngine(model, CONFIG.replace(cuda_graphs=cuda_graphs)) as engine:
            outputs.append(run(engine))
    assert outputs[0] == outputs[1]


def test_off_and_automatic(model: LlamaForCausalLM, replays: Counter[tuple[int, int]]) -> None:
    for cuda_graphs in (False, None):
        with InferenceEngine(model, CONFIG.replace(cuda_graphs=cuda_graphs)) as engine:
            assert engine.ranks[0].graph_sizes == () and "CUDA graphs" not in engine.describe_mesh()
            engine.generate(PROMPTS[0], greedy(3), progress=False)
    assert not replays


@pytest.mark.parametrize("sizes", [{}, pytest.param({"tp_size": 2}, marks=pytest.mark.slow)], ids=["one", "two ranks"])
def test_what_cannot_be_captured_is_refused(sizes: dict[str, int], model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError) as error:
        InferenceEngine(model, CONFIG.replace(cuda_graphs=True, attention_backend="eager", **sizes))
    assert str(error.value) == (
        "InferenceConfig.cuda_graphs: True cannot be here: attention_backend='eager' cannot be captured"
    )


def test_a_prompt_is_not_replayed(model: LlamaForCausalLM) -> None:
    with InferenceEngine(model, CONFIG.replace(cuda_graphs=True)) as engine:
        graphs: DecodeGraphs = engine._world.executor.worker.runner.graphs  # type: ignore[attr-defined]
        assert len(graphs) == len(SIZES)

        def size_for(*query_lens: int) -> int | None:
            tokens, count = array("q", [1] * sum(query_lens)), len(query_lens)
            return graphs.size_for(StepInput(1, tokens, query_lens, (0,) * count, (array("i", [0]),) * count, ()))

        assert [size_for(*[1] * n) for n in range(1, 13)] == [1, 2, 4, 4, 8, 8, 8, 8, 11, 11, 11, None]
        assert size_for(2) is size_for(1, 1, 5) is None


def test_a_draw_that_is_mended_reaches_the_next_step() -> None:
    """Of a flat distribution the likeliest 128 tokens are too few for top-p: the step after needs the right one."""
    model = make_llama(vocab_size=700, initializer_range=0.02, head_dim=16)
    outputs: list[Any] = []
    params = [SamplingParams(temperature=1.0, top_p=p, max_tokens=12, ignore_eos=True) for p in (1.0, 0.97, 0.9, 0.01)]
    for fields in ({"cuda_graphs": False}, {"async_scheduling": True}, {"async_scheduling": True, "cuda_graphs": True}):
        with InferenceEngine(model, CONFIG.replace(**fields)) as engine:
            engine._world.executor._launches = True  # type: ignore[attr-defined]  # as on a GPU: a step, then the next
            redrawn = Counter[bool]()
            runner = engine._world.executor.worker.runner  # type: ignore[attr-defined]
            redraw = runner.drawing.sampler.redraw

            def spy(
                draw: Any, complete: list[bool], redraw: Any = redraw, redrawn: Counter[bool] = redrawn
            ) -> torch.Tensor:
                drawn: torch.Tensor = redraw(draw, complete)
                redrawn[torch.equal(drawn, draw.token_ids)] += 1
                return drawn

            runner.drawing.sampler.redraw = spy
            made = engine.generate(PROMPTS[:4], params, progress=False)
            outputs.append([o.token_ids for o in made])
            assert redrawn[False] > 3, "draws were mended"
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0][1])) > 8
