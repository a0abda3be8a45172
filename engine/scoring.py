"""What is told of texts that are only computed: how probable they are (`score`), and as vectors (`embed`)."""

from typing import Any

import numpy as np

from .output import EmbeddingOutput, RequestOutput, ScoreOutput
from .prompts import PreparedRequest, Preparer, as_list, in_batch

POOLINGS = ("mean", "last", "first")


def prepare_scores(preparer: Preparer, texts: Any, continuations: Any, logprobs: int) -> list[PreparedRequest]:
    """One request for each text. Raises ValueError or TypeError, naming the text, as `Preparer.prepare`."""
    given = as_list(texts, "texts")
    each = [None] * len(given) if continuations is None else as_list(continuations, "continuations")
    if len(each) != len(given):
        raise ValueError(f"continuations: {len(each)} given for {len(given)} texts; give one for each")
    pairs = list(zip(given, each, strict=True))
    return in_batch("texts", pairs, lambda text, continuation: preparer.prepare_scored(text, continuation, logprobs))


def prepare_embeddings(preparer: Preparer, texts: Any, pooling: str) -> list[PreparedRequest]:
    """The same, for vectors."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r}: it must be 'mean', 'last' or 'first'")
    given = [(text,) for text in as_list(texts, "texts")]
    return in_batch("texts", given, lambda text: preparer.prepare_pooled(text, pooling))


def score_of(request: PreparedRequest, output: RequestOutput) -> ScoreOutput:
    """Of a request that has ended."""
    assert output.prompt_logprobs is not None
    return ScoreOutput(tuple(request.token_ids), tuple(told for told in output.prompt_logprobs if told is not None))


def embedding_of(request: PreparedRequest, output: RequestOutput, normalize: bool) -> EmbeddingOutput:
    """Of a request that has ended."""
    parts = np.stack([np.frombuffer(part, np.float32) for part in output.pooled])
    vector: Any = parts.sum(axis=0, dtype=np.float64) / (len(request.token_ids) - request.num_unasked)
    if normalize:
        vector /= max(float(np.linalg.norm(vector)), 1e-12)
    return EmbeddingOutput(tuple(request.token_ids), tuple(vector.astype(np.float32).tolist()))
