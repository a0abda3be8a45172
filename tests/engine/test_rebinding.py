"""`set_attention_backend` while requests are in flight: on all ranks or on none, and no token changes."""

import signal
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine, SamplingParams
from meshlm.engine.worker import Worker
from meshlm.kernels.cpu import Unavailable
from meshlm.kernels.cpu.build import load_library
from meshlm.shardformer import backends
from meshlm.shardformer.backends import EagerBackend
from tiny import make_llama

try:
    load_library()
except Unavailable as reason:
    pytest.skip(f"there is only eager here: {reason}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = InferenceConfig(device="cpu", num_kv_blocks=64, block_size=4, max_num_batched_tokens=16)
PROMPTS = [[5, 6, 7], list(range(10, 40)), [99] * 9, [1]]
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def model_of(head_dim: int) -> LlamaForCausalLM:
    return make_llama(head_dim=head_dim)


def expected(model: LlamaForCausalLM) -> list[list[int]]:
    return [
        model.generate(torch.tensor([p]), max_new_tokens=20, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in PROMPTS
    ]


def rebound_every_few_steps(engine: InferenceEngine, names: list[str]) -> list[list[int]]:
    ids = [engine.add_request(prompt, PARAMS) for prompt in PROMPTS]
    finished: dict[str, list[int]] = {}
    number = 0
    while engine.has_unfinished():
        finished.update((o.request_id, list(o.token_ids)) for o in engine.step() if o.finished)
        if number % 3 == 2:
            name = names[number // 3 % len(names)]
            engine.set_attention_backend(name)
            assert all(rank.attention_backends == (name,) for rank in engine.ranks)
            assert f"attention {name}" in engine.describe()
        number += 1
    assert number > 15
    engine.check()
    return [finished[request_id] for request_id in ids]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        pytest.param({"tp_size": 2, "pp_size": 2}, marks=pytest.mark.slow),
        pytest.param({"dp_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tokens_do_not_change(sizes: dict[str, int]) -> None:
    model = model_of(16)
    with InferenceEngine(model, CONFIG.replace(**sizes)) as engine:
        assert {rank.attention_backends for rank in engine.ranks} == {("cpu",)}
        assert rebound_every_few_steps(engine, ["eager", "cpu"]) == expected(model)


class Broken(EagerBackend):
    """Forgets the scale."""

    name = "broken"

    def forward(self, query: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        return super().forward(query * 3, *args)


class BrokenLater(EagerBackend):
    """Is right on small random caches, and wrong on long sequences."""

    name = "broken later"

    def forward(self, query: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        out = super().forward(query, *args)
        return out * (1.0 if max(group.key_len for group in args[2].groups) < 25 else float("nan"))


class Raising(EagerBackend):
    """Does not compile, say."""

    name = "raising"

    def forward(self, query: Tensor, *args: Any) -> Tensor:
        raise RuntimeError("no kernel\nfor this device")


def test_a_backend_that_raises_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, Raising.name, Raising)
    reason = r"^attention_backend='raising' failed when it was tried: RuntimeError: no kernel for this device$"
    with InferenceEngine(model_of(16), CONFIG) as engine:
        before = engine.generate(PROMPTS, PARAMS, progress=False)
        with pytest.raises(ValueError, match=reason):
            engine.set_attention_backend("raising")
        assert engine.ranks[0].attention_backends == ("cpu",)
        after = engine.generate(PROMPTS, PARAMS, progress=False)
        assert [o.token_ids for o in before] == [o.token_ids for o in after]


def test_what_cannot_be_captured_leaves_the_old_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs of the new backend fail: the old one, and its graphs, are there again."""
    model = model_of(16)
    config = CONFIG.replace(cuda_graphs=True, max_num_seqs=4)

    class Uncapturable(backends.CpuBackend):
        name = "uncapturable"

        def forward(self, query: Tensor, *args: Any) -> Tensor:
            if len(query) == 4 and args[2].max_query_len == 1:  # as the largest of the graphs
                raise RuntimeError("not in a graph")
            return super().forward(query, *args)

    monkeypatch.setitem(backends.BACKENDS, Uncapturable.name, Uncapturable)
    with InferenceEngine(model, config) as engine:
        before = engine.ranks
        with pytest.raises(
            ValueError, match=r"^set_attention_backend\('uncapturable'\): a step of 4 .* not in a graph"
        ):
            engine.set_attention_backend("uncapturable")
        assert engine.ranks == before and engine.ranks[0].graph_sizes == (4, 2, 1)
        outputs = engine.generate(PROMPTS, PARAMS, progress=False)
        assert [list(output.token_ids) for output in outputs] == expected(model)


@pytest.mark.parametrize("broken", [Broken, BrokenLater])
def test_a_backend_that_is_wrong_is_refused(broken: type[EagerBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, broken.name, broken)
    model = model_of(16)
    with InferenceEngine(model, CONFIG) as engine:
        ids = [engine.add_request(prompt, PARAMS) for prompt in PROMPTS]
        outputs = {o.request_id: list(o.token_ids) for _ in range(8) for o in engine.step() if o.finished}
        with pytest.raises(ValueError, match=f"attention_backend='{broken.name}' does not reproduce eager here"):
            engine.set_attention_backend(broken.name)
        assert engine.ranks[0].attention_backends == ("cpu",)
        while engine.has_unfinished():
            outputs |= {o.request_id: list(o.token_ids) for o in engine.step() if o.finished}
        assert [outputs[request_id] for request_id in ids] == expected(model)


@pytest.mark.parametrize(
    "sizes", [{}, pytest.param({"tp_size": 2}, marks=pytest.mark.slow)], ids=["one rank", "two ranks"]
)
def test_a_backend_that_cannot_serve_is_refused(sizes: dict[str, int]) -> None:
    with InferenceEngine(model_of(20), CONFIG.replace(**sizes)) as engine:
        before = engine.generate(PROMPTS, PARAMS, progress=False)
        where = r"rank 0 \(dp 0, pp 0, tp 0\): " if sizes else ""
        with pytest.raises(ValueError, match=rf"^{where}attention_backend='cpu' cannot serve here: head_dim=20"):
            engine.set_attention_backend("cpu")
        with pytest.raises(ValueError, match=r"^set_attention_backend: 'flesh' is not known; known: auto, tuned, "):
            engine.set_attention_backend("flesh")
        assert engine.ranks[0].attention_backends == ("eager",)
        after = engine.generate(PROMPTS, PARAMS, progress=False)
        assert [o.token_ids for o in before] == [o.token_ids for o in after]


def test_an_interrupt_finds_it_done(monkeypatch: pytest.MonkeyPatch) -> None:
    try_backend = Worker.try_backend

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return try_backend(*arguments)

    monkeypatch.setattr(Worker, "try_backend", interrupted)
    with InferenceEngine(model_of(16), CONFIG) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.set_attention_backend("eager")
        assert engine.ranks[0].attention_backends == ("eager",)
        assert engine.generate(PROMPTS[:1], PARAMS, progress=False)[0].finished
