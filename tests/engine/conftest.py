"""What tests of the engine share: processes that they start, and engines of a tiny model.

transformers' models take seconds to import, which files that have no model need not wait for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from meshlm import InferenceConfig, InferenceEngine

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

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
    from tiny import make_llama

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


StartTiny = Callable[..., contextlib.AbstractContextManager[InferenceEngine]]


@pytest.fixture(scope="session")
def start_tiny(tiny_model: LlamaForCausalLM) -> StartTiny:
    """start_tiny(**fields): an engine of its own, with room for hundreds of sequences; left whole."""
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 4, "num_kv_blocks": 2048}
    common |= {"max_num_seqs": 512, "max_model_len": 96}

    @contextlib.contextmanager
    def start(**fields: Any) -> Iterator[InferenceEngine]:
        with InferenceEngine(tiny_model, InferenceConfig(**{**common, **fields})) as engine:
            yield engine
            engine.check()

    return start


@pytest.fixture(scope="session")
def tiny_local(start_tiny: StartTiny) -> Iterator[InferenceEngine]:
    """Such a one in this process, and for the whole session."""
    with start_tiny() as engine:
        yield engine
