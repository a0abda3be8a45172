"""Weights that are in no file: a module's that is in this process, or random ones."""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..shard import Range
from ..weights import WeightSource, most_common_dtype
from .safetensors import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ModuleSource(WeightSource):
    """The weights of a transformers module that is already in this process."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: Mapping[str, Tensor] = module.state_dict()
        self.dtype = most_common_dtype(tensor.dtype for tensor in self._tensors.values())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        part = self._tensors[name][tuple(slice(*r) for r in ranges)]
        self.bytes_read += part.numel() * part.element_size()
        out.copy_(part)

    def save(self, path: str, names: Sequence[str]) -> None:
        """Writes these tensors as one safetensors file, without a second copy of them all in memory.

        (safetensors' own writer goes by a temporary file beside `path`, which a file without a name does not have.)
        """
        header: dict[str, Any] = {}
        offset = 0
        for name in names:
            tensor = self._tensors[name]
            stop = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                tensor = self._tensors[name].detach().cpu().contiguous()
                tensor.view(-1).view(torch.uint8).numpy().tofile(file)


class RandomSource(WeightSource):
    """Weights drawn where they are needed, for benchmarks: no file is read and nothing is held twice.

    Small normal numbers; norms are ones. A slice has the same numbers on every rank that asks for it, but is not the
    slice of anything larger: what is computed depends on the mesh.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        self.shapes, self.dtype = dict(shapes), dtype

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        seed = zlib.crc32(f"{name} {ranges}".encode())
        out.normal_(std=0.02, generator=torch.Generator(out.device).manual_seed(seed))
