"""Engines of tiny models, and several ways to schedule the same requests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from meshlm import InferenceConfig, InferenceEngine, RequestOutput

COMMON: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 64, "block_size": 4}
PROMPT = [7 * i % 101 for i in range(17)]  # its fifth block is shared while it is part full
CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no prefixes": {"enable_prefix_caching": False},
    "few blocks": {"num_kv_blocks": 12, "enable_prefix_caching": False},
    "few blocks, prefixes": {"num_kv_blocks": 12},
    "chunks": {"max_num_batched_tokens": 3},
    "looking ahead": {"async_scheduling": True},
    "guessing": {"speculative": {"method": "ngram", "prompt_lookup_min": 1, "adaptive": False}},
}


def syllables() -> Any:
    """A tokenizer with a syllable for each token of `tiny.make_llama`."""
    words = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:101])}, unk_token="ba"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@contextmanager
def running(model: Any, tokenizer: Any = None, **fields: Any) -> Iterator[InferenceEngine]:
    """An engine that holds nothing in the end."""
    with InferenceEngine(model, InferenceConfig(**{**COMMON, **fields}), tokenizer) as engine:
        yield engine
        assert not engine.has_unfinished()
        engine.check()
        for replica in engine.stats().replicas:
            assert replica.num_free_blocks == replica.num_blocks and not replica.num_running + replica.num_waiting


def one(engine: InferenceEngine, params: Any, prompt: Sequence[int] = PROMPT) -> RequestOutput:
    return engine.generate(list(prompt), params, progress=False)[0]


def told(output: RequestOutput) -> list[Any]:
    """Of each completion, what rounding does not change."""
    ids = [[t.top_ids for t in c.logprobs] if c.logprobs is not None else None for c in output.outputs]
    return [(c.token_ids, c.finish_reason, tops) for c, tops in zip(output.outputs, ids, strict=True)]
