"""Where weights come from: files of each format, modules in memory, and what is made of their tensors."""

from .gguf import GGUFSource
from .memory import ModuleSource, RandomSource
from .mxfp4 import MXFP4Source
from .pickled import PickledSource
from .safetensors import SafetensorsSource
from .virtual import Virtual, VirtualSource

__all__ = [
    "GGUFSource",
    "MXFP4Source",
    "ModuleSource",
    "PickledSource",
    "RandomSource",
    "SafetensorsSource",
    "Virtual",
    "VirtualSource",
]
