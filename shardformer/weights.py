"""Reading a rank's own slices of a checkpoint, and proving that nothing is missing or left over.

A `WeightSource` knows the names, shapes and dtypes of a checkpoint's tensors and reads a slice of one straight into
memory that already exists. A parameter says which slices fill it (`Piece`); `load_weights` checks that the pieces
tile it exactly and reads them.
"""

import ctypes
import json
import operator
import os
import re
import struct
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..policies import ModelSpec
from .shard import Range

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_STAGING_BYTES = 8 << 20  # the most that is held twice while a slice is converted or moved to a device


class CheckpointError(ValueError):
    """A checkpoint that cannot be what its config says, each fault named."""


@dataclass(frozen=True)
class Piece:
    """A slice of a checkpoint tensor and the box of a parameter that it fills."""

    tensor: str
    ranges: tuple[Range, ...]  # one (start, stop) for each dim of the checkpoint's tensor
    start: tuple[int, ...] = ()  # the box's first index in the parameter; dims that are not given begin at 0
    transposed: bool = False  # a matrix that the parameter holds transposed

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        shape = tuple(stop - start for start, stop in self.ranges)
        return shape[::-1] if self.transposed else shape

    @property
    def box(self) -> tuple[Range, ...]:
        """(start, stop) in each dim of the parameter."""
        start = self.start + (0,) * (len(self.ranges) - len(self.start))
        return tuple((first, first + length) for first, length in zip(start, self.shape, strict=True))


class WeightSource(ABC):
    """Where weights come from. Sources can be pickled: a rank opens for itself what it reads."""

    shapes: dict[str, tuple[int, ...]]  # of every tensor that the checkpoint holds
    dtype: str = "float32"  # of most tensors
    bytes_read: int = 0

    @abstractmethod
    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        """Fills `out` (of the slice's shape; any strides, dtype and device) with a slice of a tensor."""

    def close(self) -> None:  # noqa: B027  (there may be nothing to close)
        """Lets go of files; a later `read` opens them again."""


@dataclass(frozen=True)
class _Entry:
    file: str
    offset: int  # of the tensor's first byte in the file
    dtype: str
    shape: tuple[int, ...]


class SafetensorsSource(WeightSource):
    """One safetensors file, or a directory with a sharded index or a ``model.safetensors``.

    Reads with pread into the destination, not through a memory map, whose pages would count as the rank's memory
    beside the parameters. Format: github.com/huggingface/safetensors.
    """

    def __init__(self, path: Path) -> None:
        files, index = _safetensors_files(path)
        self._entries: dict[str, _Entry] = {}
        for file in files:
            for name, entry in _read_header(file).items():
                other = self._entries.setdefault(name, entry)
                if other is not entry:
                    raise CheckpointError(f"{path}: tensor {name} is in two files: {other.file} and {entry.file}")
        for name, file in index.items():
            found = self._entries.get(name)
            if found is None or found.file != str(file):
                where = "in no file that it names" if found is None else f"in {found.file}"
                raise CheckpointError(f"{path / _INDEX}: tensor {name} is said to be in {file}, but is {where}")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        most_common = Counter(entry.dtype for entry in self._entries.values()).most_common(1)
        self.dtype = str(_DTYPES[most_common[0][0]]).removeprefix("torch.") if most_common else "float32"
        self._files: dict[str, int] = {}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        entry = self._entries[name]
        dtype = _DTYPES[entry.dtype]
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


def _safetensors_files(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files, and where the index says that each tensor is, if there is one."""
    if not path.is_dir():
        return [path], {}
    index_file = path / _INDEX
    if index_file.exists():
        try:
            weight_map = json.loads(index_file.read_text())["weight_map"]
            index = {name: path / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index_file}: not a safetensors index: {error!r}") from error
        files = sorted(set(index.values()))
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{path}: missing {', '.join(missing)}, named in {index_file.name}")
        return files, index
    whole = path / "model.safetensors"
    files = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: holds no *.safetensors file (and no {index_file.name})")
    return files, {}


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
        if dtype not in _DTYPES:
            raise CheckpointError(f"{file}: tensor {name} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
        if first < 0 or last - first != prod(shape) * _DTYPES[dtype].itemsize:
            raise CheckpointError(
                f"{file}: tensor {name} of shape {list(shape)} and dtype {dtype} cannot be bytes {first} to {last}"
            )
        entries[name] = _Entry(str(file), begin, dtype, shape)
    return entries


_LLAMA3_FACTORS = "rope_freqs.weight"
_ROPE_SCALING = ("scaling.type", "scaling.factor", "scale_linear", "scaling.attn_factor")


class GGUFSource(WeightSource):
    """A GGUF file, dequantised tensor by tensor; names and layout as transformers maps them."""

    def __init__(self, path: Path, hf_config: Any, spec: ModelSpec) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self._path = str(path)
        if any(tensor.name == _LLAMA3_FACTORS for tensor in self._reader.tensors):
            raise CheckpointError(
                f"{path}: {_LLAMA3_FACTORS} (the RoPE factors of Llama 3.1 and later) is not supported: transformers "
                f"reads rope_theta alone from a GGUF file, and the tokens would be wrong; use the safetensors directory"
            )
        if scaling := self._rope_scaling():
            raise CheckpointError(
                f"{path}: {scaling} (scaled RoPE) is not supported: transformers reads rope_theta alone from a GGUF "
                f"file, and the tokens would be wrong; use the safetensors directory"
            )
        processor = TENSOR_PROCESSORS.get(hf_config.model_type, TensorProcessor)
        self._processor = processor(
            config={"num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads}
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
        names = get_gguf_hf_weights_map(model, self._processor)  # GGUF's name -> transformers'
        self._names = {}
        self.shapes = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, tensor.name)
            self._names[name] = tensor.name
            self.shapes[name] = tuple(int(n) for n in reversed(tensor.shape))

    def _rope_scaling(self) -> str:
        """The metadata that scale RoPE, as llama.cpp takes them: a factor without a type is linear. Empty if none."""
        from gguf import GGUFValueType

        found: dict[str, Any] = {}
        for key, field in self._reader.fields.items():
            name, part = key.partition(".rope.")[2], field.parts[field.data[0]] if field.data else None
            if name in _ROPE_SCALING and part is not None:
                value = bytes(part).decode() if field.types == [GGUFValueType.STRING] else part[0].item()
                found[name] = (key, value)
        kind, factor, old_factor, attention = (found.get(name, ("", 0))[1] for name in _ROPE_SCALING)
        factor = factor or old_factor or 1
        scales = kind not in (0, "none", "linear") or (kind != "none" and factor != 1) or attention not in (0, 1)
        return ", ".join(f"{key}={value!r}" for key, value in found.values()) if scales else ""

    @cached_property
    def _reader(self) -> Any:
        from gguf import GGUFReader

        return GGUFReader(self._path)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        from gguf import dequantize

        tensor = self._tensors[self._names[name]]
        values = dequantize(tensor.data, tensor.tensor_type)
        values = self._processor.process(weights=values, name=tensor.name).weights
        self.bytes_read += tensor.n_bytes
        out.copy_(torch.from_numpy(values[tuple(slice(*r) for r in ranges)].copy()))

    def close(self) -> None:
        self.__dict__.pop("_tensors", None)
        self.__dict__.pop("_reader", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_reader", "_tensors")}


class ModuleSource(WeightSource):
    """The weights of a transformers module that is already in this process."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: Mapping[str, Tensor] = module.state_dict()
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

    def __init__(self, spec: ModelSpec) -> None:
        self.shapes = spec.shapes()

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        seed = zlib.crc32(f"{name} {ranges}".encode())
        out.normal_(std=0.02, generator=torch.Generator(out.device).manual_seed(seed))


def check_checkpoint(spec: ModelSpec, source: WeightSource, where: str) -> None:
    """Proves, from names and shapes alone, that a checkpoint is the model's: nothing missing, misshapen, left over."""
    expected = spec.shapes()
    found = source.shapes
    missing = [name for name in expected if name not in found]
    wrong = [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    extra = [
        name
        for name in found
        if name not in expected and not any(re.fullmatch(pattern, name) for pattern in spec.ignored)
    ]
    faults = [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing tensors:", missing),
            ("tensors of another shape:", wrong),
            ("tensors that the model does not have:", extra),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}")


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class LoadedModule(nn.Module):
    """A module that says what fills its parameters."""

    pieces: dict[str, list[Piece]]  # by the parameter's name

    def bind(self) -> None:
        """Takes what it makes of its parameters, once they are filled."""


def load_weights(stage: nn.Module, source: WeightSource, device: torch.device) -> int:
    """Fills every parameter of a stage that was built on the meta device from its pieces, each element exactly once.

    Module by module, the largest first; each `bind`s its own form of its weights, where it has one, as soon as they
    are there: only one module at a time is held twice. Returns the bytes of all parameters.
    """
    modules = [module for module in stage.modules() if isinstance(module, LoadedModule)]
    blanks = [getattr(module, name) for module in modules for name in module.pieces]
    uses = Counter(id(blank) for blank in blanks)
    unfilled = [name for name, parameter in stage.named_parameters() if id(parameter) not in uses]
    assert not unfilled, f"parameters that nothing fills: {unfilled}"
    shared: dict[int, nn.Parameter] = {}
    num_bytes = 0
    for module in sorted(modules, key=lambda module: -sum(p.numel() for p in module.parameters(recurse=False))):
        for name, pieces in module.pieces.items():
            blank = getattr(module, name)
            filled = shared.get(id(blank))
            if filled is None:
                filled = _fill(blank, pieces, source, device)
                num_bytes += filled.numel() * filled.element_size()
                if uses[id(blank)] > 1:  # tied
                    shared[id(blank)] = filled
            setattr(module, name, filled)
        module.bind()
        _return_freed_memory()
    source.close()
    return num_bytes


def _return_freed_memory() -> None:
    """Gives freed heap back to the system where malloc can (glibc's malloc_trim).

    Without it the plain weights that were let go leave holes of up to 30 MiB between the bound ones.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _fill(blank: Tensor, pieces: Sequence[Piece], source: WeightSource, device: torch.device) -> nn.Parameter:
    assert _tile(blank.shape, [piece.box for piece in pieces]), (pieces, blank.shape)
    parameter = nn.Parameter(torch.empty_like(blank, device=device), requires_grad=False)
    for piece in pieces:
        part = parameter.data[tuple(slice(*box) for box in piece.box)]
        source.read(piece.tensor, piece.ranges, part.T if piece.transposed else part)
    return parameter


def _tile(shape: Sequence[int], boxes: Sequence[tuple[Range, ...]]) -> bool:
    """Whether boxes cover each element of a tensor once: counted on the grid that all their edges make."""
    if any(len(box) != len(shape) for box in boxes):
        return False
    edges = [sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)]
    if any((cuts[0], cuts[-1]) != (0, size) for cuts, size in zip(edges, shape, strict=True)):
        return False
    cells = [{edge: cell for cell, edge in enumerate(cuts)} for cuts in edges]
    count = np.zeros([len(cuts) - 1 for cuts in edges], dtype=np.int32)
    for box in boxes:
        count[tuple(slice(cell[start], cell[stop]) for cell, (start, stop) in zip(cells, box, strict=True))] += 1
    return bool((count == 1).all())
