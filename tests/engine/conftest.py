"""What tests of the engine share: processes that they start, and engines of a tiny model."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import LlamaForCausalLM

from meshlm import InferenceConfig, InferenceEngine
from tiny import make_llama

Torchrun = Callable[..., contextlib.AbstractContextManager[subprocess.Popen[str]]]


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """torchrun(num_ranks, script, *arguments): its agent's process, under way; ended with all ranks at last."""

    @contextlib.contextmanager
    def start(num_ranks: int, script: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        agent = subprocess.Popen(
            [*command, str(script), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield agent
        finally:
            if agent.poll() is None:  # a test that failed or ran out of time
                for process in psutil.Process(agent.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            agent.kill()
            agent.communicate()

    return start


# ---- engines of a tiny model on several meshes -----------------------------------------------------------------------

TINY_MESHES: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2},
    "dp2": {"dp_size": 2},
}


@pytest.fixture(scope="session")
def tiny_model() -> LlamaForCausalLM:
    return make_llama(num_hidden_layers=2, max_position_embeddings=96)


@pytest.fixture(
    scope="session",
    params=[pytest.param(mesh, marks=pytest.mark.slow) if mesh == "dp2" else mesh for mesh in TINY_MESHES],
)
def tiny_shared(request: pytest.FixtureRequest, tiny_model: LlamaForCausalLM) -> Iterator[InferenceEngine]:
    """One for each mesh and the whole session: small chunks, and few blocks, for which ten requests compete."""
    config = InferenceConfig(
        device="cpu",
        dtype="float32",
        block_size=4,
        num_kv_blocks=40,
        max_model_len=96,
        max_num_batched_tokens=24,
        **TINY_MESHES[request.param],
    )
    with InferenceEngine(tiny_model, config) as engine:
        yield engine


@pytest.fixture
def tiny_engine(tiny_shared: InferenceEngine) -> Iterator[InferenceEngine]:
    """Idle, and left whole: no request, no block held."""
    yield tiny_shared
    assert not tiny_shared.has_unfinished()
    tiny_shared.check()
    assert all(replica.num_free_blocks == replica.num_blocks for replica in tiny_shared.stats().replicas)


# ---- and of one with few tokens, for distributions ------------------------------------------------------------------

SMALL_MESHES: dict[str, dict[str, int]] = {"tp2": {"tp_size": 2}, "pp2": {"pp_size": 2}, "dp2": {"dp_size": 2}, "1": {}}

StartSmall = Callable[..., contextlib.AbstractContextManager[InferenceEngine]]


@pytest.fixture(scope="session")
def small_model() -> LlamaForCausalLM:
    """37 tokens, of which two ranks have different numbers."""
    return make_llama(vocab_size=37)


@pytest.fixture(scope="session")
def start_small(small_model: LlamaForCausalLM) -> StartSmall:
    """start_small(**fields): an engine with the small model; proves at the end that it has lost nothing."""
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 4, "num_kv_blocks": 2048}
    common |= {"max_num_seqs": 512, "max_model_len": 48}

    @contextlib.contextmanager
    def start(**fields: Any) -> Iterator[InferenceEngine]:
        with InferenceEngine(small_model, InferenceConfig(**{**common, **fields})) as engine:
            yield engine
            engine.check()

    return start


@pytest.fixture(scope="session")
def small_local(start_small: StartSmall) -> Iterator[InferenceEngine]:
    """In this process."""
    with start_small() as engine:
        yield engine


@pytest.fixture(scope="session", params=SMALL_MESHES)
def small_engine(request: pytest.FixtureRequest, start_small: StartSmall) -> Iterator[InferenceEngine]:
    """On each mesh; the one that stays to the end of the session has no ranks of its own."""
    if not SMALL_MESHES[request.param]:
        yield request.getfixturevalue("small_local")
        return
    with start_small(**SMALL_MESHES[request.param]) as engine:
        yield engine
