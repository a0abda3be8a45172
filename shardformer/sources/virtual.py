"""Tensors that are put together from boxes of stored ones: stacked, concatenated, cut, transposed, reordered.

Nothing is read to make one. Reading a slice reads the parts of the boxes that lie in it, and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..shard import Range
from ..weights import WeightSource


@dataclass(frozen=True)
class Box:
    """A box of a stored tensor, and where it lies in a virtual one."""

    tensor: str
    ranges: tuple[Range, ...]  # of the stored tensor
    dims: tuple[int, ...]  # of the virtual tensor, for each of the stored one; along the others the box has length 1
    start: tuple[int, ...]  # first index in the virtual tensor

    @property
    def stop(self) -> tuple[int, ...]:
        lengths = [1] * len(self.start)
        for dim, (first, last) in zip(self.dims, self.ranges, strict=True):
            lengths[dim] = last - first
        return tuple(start + length for start, length in zip(self.start, lengths, strict=True))

    def within(self, dim: int, start: int, stop: int) -> "Box | None":
        """What of it lies from `start` to `stop` along a dim of the virtual tensor."""
        first, last = max(start, self.start[dim]), min(stop, self.stop[dim])
        if first >= last:
            return None
        offset = first - self.start[dim]
        ranges = tuple(
            (low + offset, low + offset + last - first) if each == dim else (low, high)
            for each, (low, high) in zip(self.dims, self.ranges, strict=True)
        )
        return replace(self, ranges=ranges, start=(*self.start[:dim], first, *self.start[dim + 1 :]))

    def moved(self, dim: int, by: int) -> "Box":
        return replace(self, start=(*self.start[:dim], self.start[dim] + by, *self.start[dim + 1 :]))


@dataclass(frozen=True)
class Virtual:
    """A tensor that boxes tile."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def stored(cls, name: str, shape: tuple[int, ...]) -> "Virtual":
        """A stored tensor as it is."""
        box = Box(name, tuple((0, size) for size in shape), tuple(range(len(shape))), (0,) * len(shape))
        return cls(shape, (box,))

    @property
    def names(self) -> list[str]:
        """Of the stored tensors."""
        return list(dict.fromkeys(box.tensor for box in self.boxes))

    def narrow(self, dim: int, start: int, stop: int) -> "Virtual":
        parts = (box.within(dim, start, stop) for box in self.boxes)
        boxes = tuple(part.moved(dim, -start) for part in parts if part is not None)
        return Virtual((*self.shape[:dim], stop - start, *self.shape[dim + 1 :]), boxes)

    def split(self, dim: int, sizes: Sequence[int]) -> "list[Virtual]":
        stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [self.narrow(dim, stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]

    def take(self, dim: int, order: Sequence[int]) -> "Virtual":
        """Its rows along `dim` in another order."""
        return concatenate([self.narrow(dim, row, row + 1) for row in order], dim)

    def transpose(self, first: int, second: int) -> "Virtual":
        swap = list(range(len(self.shape)))
        swap[first], swap[second] = swap[second], swap[first]
        boxes = tuple(
            replace(box, dims=tuple(swap[dim] for dim in box.dims), start=tuple(box.start[dim] for dim in swap))
            for box in self.boxes
        )
        return Virtual(tuple(self.shape[dim] for dim in swap), boxes)

    def unsqueeze(self, dim: int) -> "Virtual":
        boxes = tuple(
            replace(
                box,
                dims=tuple(each + (each >= dim) for each in box.dims),
                start=(*box.start[:dim], 0, *box.start[dim:]),
            )
            for box in self.boxes
        )
        return Virtual((*self.shape[:dim], 1, *self.shape[dim:]), boxes)

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 indices of the boxes, [boxes, dims] each."""
        starts = np.array([box.start for box in self.boxes]).reshape(len(self.boxes), -1)
        return starts, np.array([box.stop for box in self.boxes]).reshape(len(self.boxes), -1)


def concatenate(tensors: Sequence[Virtual], dim: int) -> Virtual:
    """Raises ValueError if they differ in another dim."""
    shape = list(tensors[0].shape)
    boxes: list[Box] = []
    shape[dim] = 0
    for tensor in tensors:
        if [*tensor.shape[:dim], *tensor.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]]:
            raise ValueError(
                f"{tensors[0].names[0]} {list(tensors[0].shape)} and {tensor.names[0]} {list(tensor.shape)}"
            )
        boxes += [box.moved(dim, shape[dim]) for box in tensor.boxes]
        shape[dim] += tensor.shape[dim]
    return Virtual(tuple(shape), tuple(boxes))


def stack(tensors: Sequence[Virtual], dim: int) -> Virtual:
    """Raises ValueError if their shapes differ."""
    return concatenate([tensor.unsqueeze(dim) for tensor in tensors], dim)


class VirtualSource(WeightSource):
    """Virtual tensors over another source."""

    def __init__(self, stored: WeightSource, tensors: dict[str, Virtual]) -> None:
        self._stored, self._tensors = stored, tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtype = stored.dtype

    @property
    def bytes_read(self) -> int:  # type: ignore[override]
        return self._stored.bytes_read

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        if not out.numel():
            return
        tensor = self._tensors[name]
        starts, stops = tensor.bounds
        low, high = (np.array([r[i] for r in ranges], dtype=np.int64) for i in range(2))
        for index in np.flatnonzero(((starts < high) & (stops > low)).all(axis=1)):
            box: Box | None = tensor.boxes[index]
            for dim, (start, stop) in enumerate(ranges):
                assert box is not None
                box = box.within(dim, start, stop)
            assert box is not None
            origins = [start for start, _ in ranges]
            place = zip(box.start, box.stop, origins, strict=True)
            part = out[tuple(slice(start - origin, stop - origin) for start, stop, origin in place)]
            single = [dim for dim in range(out.ndim) if dim not in box.dims]
            part = part.permute([*box.dims, *single])
            for _ in single:
                part = part[..., 0]
            self._stored.read(box.tensor, box.ranges, part)

    def close(self) -> None:
        self._stored.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": {name: replace(t) for name, t in self._tensors.items()}}
