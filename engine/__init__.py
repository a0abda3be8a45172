"""The engine: sequences, scheduling, executors, sampling, and `InferenceEngine`."""

from .engine import EngineStats, InferenceEngine
from .output import CompletionOutput, RequestOutput, RequestTimings

__all__ = ["CompletionOutput", "EngineStats", "InferenceEngine", "RequestOutput", "RequestTimings"]
