"""Safetensors, read slice by slice. Format: github.com/huggingface/safetensors."""

import json
import operator
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..shard import Range
from ..weights import CheckpointError, WeightSource, most_common_dtype
from .files import check_index, checkpoint_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WHOLE = "model.safetensors"  # a checkpoint in one file
_STAGING_BYTES = 8 << 20  # the most that is held twice while a slice is converted or moved to a device


@dataclass(frozen=True)
class _Entry:
    file: str
    offset: int  # of the tensor's first byte in the file
    dtype: str
    shape: tuple[int, ...]


class SafetensorsSource(WeightSource):
    """One safetensors file, or those of a directory.

    Reads with pread into the destination, not through a memory map, whose pages would count as the rank's memory
    beside the parameters.
    """

    def __init__(self, path: Path) -> None:
        files, index = checkpoint_files(path, WHOLE, "*.safetensors") if path.is_dir() else ([path], {})
        if not files:
            raise CheckpointError(f"{path}: holds no *.safetensors file (and no {WHOLE}.index.json)")
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _read_header(file).items():
                other = self._entries.setdefault(name, entry)
                if other is not entry:
                    raise CheckpointError(f"{path}: tensor {name} is in two files: {other.file} and {entry.file}")
        check_index(path, WHOLE, index, {name: entry.file for name, entry in self._entries.items()})
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtype = most_common_dtype(DTYPES[entry.dtype] for entry in self._entries.values())
        self._files: dict[str, int] = {}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        entry = self._entries[name]
        dtype = DTYPES[entry.dtype]
        if out.is_floating_point() and not dtype.is_floating_point:
            raise CheckpointError(f"{entry.file}: tensor {name} has dtype {entry.dtype}, which no weight has")
        if out.dtype == dtype and out.device.type == "cpu" and (out.ndim == 0 or out.stride(-1) == 1):
            self._read_runs(entry, ranges, out)
            return
        most = max(1, _STAGING_BYTES // dtype.itemsize)
        size = min(most, max(out.numel(), 1))
        staging = torch.empty(size, dtype=dtype, pin_memory=out.device.type == "cuda")
        for block in _blocks(ranges, most):
            lengths = [stop - start for start, stop in block]
            part = staging[: prod(lengths)].view(lengths)
            self._read_runs(entry, block, part)
            inside = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(block, ranges, strict=True))
            out[inside].copy_(part)

    def _read_runs(self, entry: _Entry, ranges: tuple[Range, ...], out: Tensor) -> None:
        """Reads into host memory whose last dim is contiguous, in as few runs as both sides' layouts allow."""
        if not out.numel():
            return
        size = out.element_size()
        strides = [prod(entry.shape[dim + 1 :]) for dim in range(out.ndim)]
        outer, run = out.ndim, 1  # dims that are stepped through, and elements that lie together behind them
        while outer and (out.shape[outer - 1] == 1 or out.stride(outer - 1) == run == strides[outer - 1]):
            run *= out.shape[outer - 1]
            outer -= 1
        span = 1 + sum((length - 1) * stride for length, stride in zip(out.shape, out.stride(), strict=True))
        flat = out.as_strided((span,), (1,))
        buffer = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        first = sum(start * stride for (start, _), stride in zip(ranges, strides, strict=True))
        for index in product(*(range(length) for length in out.shape[:outer])):
            offset = (first + sum(map(operator.mul, index, strides))) * size
            begin = sum(map(operator.mul, index, out.stride())) * size
            self._pread(entry, offset, buffer[begin : begin + run * size])

    def _pread(self, entry: _Entry, offset: int, buffer: memoryview) -> None:
        if entry.file not in self._files:
            self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
        fd, position = self._files[entry.file], entry.offset + offset
        while buffer:
            count = os.preadv(fd, [buffer], position)
            if count == 0:
                raise CheckpointError(f"{entry.file}: ended at byte {position} while its header promised more")
            self.bytes_read += count
            position += count
            buffer = buffer[count:]

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _blocks(ranges: tuple[Range, ...], most: int) -> Iterator[tuple[Range, ...]]:
    """Boxes of at most `most` elements that tile `ranges`: rows together where they fit, else parts of one row."""
    if not ranges:
        yield ()
        return
    (start, stop), inner = ranges[0], ranges[1:]
    row = max(1, prod(last - first for first, last in inner))
    if row > most:
        for index in range(start, stop):
            for block in _blocks(inner, most):
                yield (index, index + 1), *block
        return
    step = most // row
    for first in range(start, stop, step):
        yield (first, min(first + step, stop)), *inner


def _read_header(file: Path) -> dict[str, _Entry]:
    whole = operator.index  # refuses what is not an integer
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or 8 + length > size:
            raise CheckpointError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = [
                (name, str(tensor["dtype"]), tuple(map(whole, tensor["shape"])), *map(whole, tensor["data_offsets"]))
                for name, tensor in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a safetensors file: {error!r}") from error
    entries = {}
    for name, dtype, shape, first, last in tensors:
        begin, end = 8 + length + first, 8 + length + last
        if end > size:
            raise CheckpointError(f"{file}: truncated: tensor {name} ends at byte {end} of a file of {size}")
        if dtype not in DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(DTYPES)}")
        if first < 0 or last - first != prod(shape) * DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"{file}: tensor {name} of shape {list(shape)} and dtype {dtype} cannot be bytes {first} to {last}"
            )
        entries[name] = _Entry(str(file), begin, dtype, shape)
    return entries
