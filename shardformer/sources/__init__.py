"""Where weights come from: files of each format, modules in memory, and what is made of their tensors."""

from .gguf import GGUFSource
from .memory import ModuleSource, RandomSource
from .pickled import PickledSource
from .safetensors import SafetensorsSource
from .virtual import Virtual, VirtualSource

__all__ = [
    "GGUFSource",
    "ModuleSource",
    "PickledSource",
    "RandomSource",
    "SafetensorsSource",
    "Virtual",
    "VirtualSource",
]
