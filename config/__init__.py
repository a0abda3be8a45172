"""What a user sets: how a model is run (`InferenceConfig`) and how tokens are chosen (`SamplingParams`)."""

from .errors import ConfigError
from .inference import InferenceConfig
from .sampling import SamplingParams, as_sampling_params
from .structured import StructuredOutputsParams

__all__ = ["ConfigError", "InferenceConfig", "SamplingParams", "StructuredOutputsParams", "as_sampling_params"]
