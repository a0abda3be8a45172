"""Filling a stage's parameters with a rank's own slices of a checkpoint, and proving that nothing is missing or over.

A `WeightSource` knows the names and shapes of a checkpoint's tensors and reads a slice of one straight into memory
that already exists. A parameter says which slices fill it (`Piece`); `load_weights` checks that the pieces tile it
exactly and reads them.
"""

import ctypes
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .shard import Range


class CheckpointError(ValueError):
    """A checkpoint that cannot be what its config says, each fault named."""


def most_common_dtype(dtypes: Iterable[torch.dtype]) -> str:
    """Of those that weights have, float32 if there is none."""
    found = Counter(dtype for dtype in dtypes if dtype.is_floating_point).most_common(1)
    return str(found[0][0] if found else torch.float32).removeprefix("torch.")


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


def faults(shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str], source: WeightSource) -> list[str]:
    """What a source lacks, has in another shape, or has too much, to be a model of these tensors; in words.

    ignored: patterns of tensors that may be there and are not used.
    """
    found = source.shapes
    missing = [name for name in shapes if name not in found]
    wrong = [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    extra = [name for name in found if name not in shapes and not any(re.fullmatch(each, name) for each in ignored)]
    return [
        f"{what} {_listed(names)}"
        for what, names in (
            ("missing tensors:", missing),
            ("tensors of another shape:", wrong),
            ("tensors that the model does not have:", extra),
        )
        if names
    ]


def check_checkpoint(
    shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str], source: WeightSource, where: str
) -> None:
    """Proves, from names and shapes alone, that a checkpoint is the model's: nothing missing, misshapen, left over."""
    if found := faults(shapes, ignored, source):
        raise CheckpointError(f"{where}: {'; '.join(found)}")


def check_tied(source: WeightSource, tied: Mapping[str, str]) -> None:
    """Proves that tensors which a model ties are the same wherever a source has both. tied: another name -> its own."""
    for copy, own in tied.items():
        if copy in source.shapes and own in source.shapes and not _same(source, copy, own):
            raise CheckpointError(
                f"tensors {copy} and {own} differ, though the config ties them (tie_word_embeddings); if both are "
                f"meant, set it to false in config.json"
            )


def _same(source: WeightSource, first: str, second: str) -> bool:
    """Whether two tensors hold the same numbers; read a few rows at a time."""
    shape = source.shapes[first]
    if shape != source.shapes[second]:
        return False
    step = max(1, (1 << 21) // max(1, prod(shape[1:])))
    dtype = getattr(torch, source.dtype)
    ours, theirs = torch.empty(2, min(step, shape[0]), *shape[1:], dtype=dtype)
    for start in range(0, shape[0], step):
        ranges = ((start, min(start + step, shape[0])), *((0, size) for size in shape[1:]))
        rows = slice(ranges[0][1] - start)
        source.read(first, ranges, ours[rows])
        source.read(second, ranges, theirs[rows])
        if not torch.equal(ours[rows], theirs[rows]):
            return False
    return True


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
    modules: list[Any] = [module for module in stage.modules() if hasattr(module, "pieces")]
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
        if isinstance(module, LoadedModule):
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
    parameter = nn.Parameter(_unfilled(blank, device), requires_grad=False)
    for piece in pieces:
        part = parameter.data[tuple(slice(*box) for box in piece.box)]
        source.read(piece.tensor, piece.ranges, part.T if piece.transposed else part)
    return parameter


def _unfilled(blank: Tensor, device: torch.device) -> Tensor:
    """As `torch.empty_like`, which takes a second to import what it makes of a meta tensor."""
    return torch.empty(blank.shape, dtype=blank.dtype, device=device)


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
