"""A server of a tiny random model with the demo model's tokenizer and chat template, for the whole session."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from meshlm import InferenceConfig
from meshlm.engine.async_engine import AsyncInferenceEngine
from meshlm.serving.api import Service
from served import Server, serving
from tiny import make_llama

MAX_MODEL_LEN = 256


@pytest.fixture(scope="session")
def server(demo_model: Path) -> Iterator[Server]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model, local_files_only=True)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "eos_token_id": 2}
    model = make_llama(max_position_embeddings=MAX_MODEL_LEN, **sizes)
    config = InferenceConfig(device="cpu", dtype="float32", block_size=8, num_kv_blocks=256, max_num_seqs=64)
    with AsyncInferenceEngine(model, config, tokenizer) as engine, serving(Service(engine, ("tiny",))) as running:
        yield running


@pytest.fixture
def idle_server(server: Server) -> Iterator[Server]:
    """One that a test leaves with nothing under way."""
    yield server
    server.wait_until_idle()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
