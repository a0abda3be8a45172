"""``pytorch_model.bin``: what torch.save pickled."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shard import Range
from ..weights import CheckpointError, WeightSource, most_common_dtype
from .files import check_index, checkpoint_files

WHOLE = "pytorch_model.bin"


class PickledSource(WeightSource):
    """The .bin files of a directory.

    Only torch's restricted unpickler ever reads them: it builds tensors and containers and refuses to call anything
    else. Tensors stay in a memory map of the file, but for files older than torch 1.6, which are read whole.
    """

    def __init__(self, directory: Path) -> None:
        files, index = checkpoint_files(directory, WHOLE, "pytorch_model*.bin")
        self._holders: dict[str, str] = {}
        self._open: dict[str, dict[str, Tensor]] = {}  # by file
        self.shapes = {}
        dtypes = []
        for file in map(str, files):
            for name, tensor in self._tensors(file).items():
                if name in self._holders:
                    raise CheckpointError(
                        f"{directory}: tensor {name} is in two files: {self._holders[name]} and {file}"
                    )
                self._holders[name] = file
                self.shapes[name] = tuple(tensor.shape)
                dtypes.append(tensor.dtype)
            self.close()
        check_index(directory, WHOLE, index, self._holders)
        self.dtype = most_common_dtype(dtypes)

    def _tensors(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            try:
                loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise CheckpointError(f"{file}: not a pickle of tensors alone: {_first_line(error)}") from error
            others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
            if others:
                raise CheckpointError(f"{file}: {others[0]} is no tensor")
            self._open[file] = loaded
        return self._open[file]

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        tensor = self._tensors(self._holders[name])[name]
        if out.is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(f"{self._holders[name]}: tensor {name} has {tensor.dtype}, which no weight has")
        part = tensor[tuple(slice(*r) for r in ranges)]
        self.bytes_read += part.numel() * part.element_size()
        out.copy_(part)

    def close(self) -> None:
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
