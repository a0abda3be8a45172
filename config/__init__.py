"""What a user sets: how a model is run (`InferenceConfig`), how tokens are chosen (`SamplingParams`) and drafted
(`SpeculativeConfig`)."""

from .errors import ConfigError
from .inference import InferenceConfig
from .sampling import SamplingParams, as_sampling_params
from .speculative import SpeculativeConfig
from .structured import StructuredOutputsParams

__all__ = [
    "ConfigError",
    "InferenceConfig",
    "SamplingParams",
    "SpeculativeConfig",
    "StructuredOutputsParams",
    "as_sampling_params",
]
