"""Keys of the noise with which tokens are drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .staging import Shapes

_GOLDEN, _MIX, _MIX_AGAIN = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)
_SIGNS = np.uint64(0x8000000080000000)  # of both words, whose range begins at the least int32
_ALIGNED = 8  # rows of a step: 64 bytes, as `staging.py` has it


class Noise:
    """Two int32 words for each row of a step: splitmix64 (Steele et al. 2014), seeded by the row's sequence, its
    position the counter. Made for some steps at once, each of which has the positions after the last one's, as most do:
    what goes to the device with one step is there for those that follow.

    seeds: uint64 [num_rows]; positions: of the first step, one for each.
    """

    def __init__(self, seeds: NDArray[np.uint64], positions: Sequence[int], num_steps: int) -> None:
        self._seeds, self._positions, self._num_steps = seeds, positions, num_steps
        self._keys: list[Tensor] = []  # of each step, on the device, once they are there

    @property
    def is_there(self) -> bool:
        return bool(self._keys)

    def has(self, positions: Sequence[int]) -> bool:
        """Whether it is made for these positions of the same sequences."""
        ahead = positions[0] - self._positions[0]
        return 0 <= ahead < self._num_steps and positions == [position + ahead for position in self._positions]

    def keys(self, positions: Sequence[int]) -> Tensor:
        """[num_rows, 2], of positions that it has."""
        return self._keys[positions[0] - self._positions[0]]

    @property
    def shapes(self) -> Shapes:
        num_padded = -(-len(self._seeds) // _ALIGNED) * _ALIGNED
        return {"keys": (torch.int32, (self._num_steps, num_padded, 2))}

    def write(self, host: Mapping[str, Any]) -> None:
        """Fills what `shapes` has made room for."""
        counters = np.array(self._positions, np.uint64) + np.arange(1, self._num_steps + 1, dtype=np.uint64)[:, None]
        z = self._seeds + counters * _GOLDEN
        z = (z ^ (z >> 30)) * _MIX
        z = (z ^ (z >> 27)) * _MIX_AGAIN
        host["keys"][:, : len(self._seeds)] = (z ^ (z >> 31) ^ _SIGNS).view(np.int32).reshape(*z.shape, 2)

    def take(self, arrays: Mapping[str, Tensor]) -> None:
        """Keeps its array out of a step's, whose memory on a GPU is the next one's too."""
        self._keys = [keys[: len(self._seeds)] for keys in arrays["keys"].clone().unbind()]
