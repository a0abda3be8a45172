"""What a user sets: how a model is run (`InferenceConfig`) and how tokens are chosen (`SamplingParams`)."""

from .errors import ConfigError
from .inference import InferenceConfig
from .sampling import SamplingParams, as_sampling_params

__all__ = ["ConfigError", "InferenceConfig", "SamplingParams", "as_sampling_params"]
