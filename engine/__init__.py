"""The engine: sequences, scheduling, executors, sampling, and `InferenceEngine`."""

from .engine import InferenceEngine
from .output import (
    CompletionOutput,
    EmbeddingOutput,
    Logprob,
    RequestOutput,
    RequestTimings,
    ScoreOutput,
    logprob_dicts,
)
from .stats import EngineStats
from .step import TokenLogprobs

__all__ = [
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineStats",
    "InferenceEngine",
    "Logprob",
    "RequestOutput",
    "RequestTimings",
    "ScoreOutput",
    "TokenLogprobs",
    "logprob_dicts",
]
