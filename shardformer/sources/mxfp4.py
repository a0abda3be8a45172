"""MXFP4 experts (OCP Microscaling Formats 1.0) as GPT-OSS stores them, dequantised as they are read."""

import torch
from torch import Tensor

from ..shard import Range
from ..weights import WeightSource

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of FP4 (E2M1) without its sign, the highest bit
_GROUP = 32  # numbers that share a scale, two in a byte, the lower half the first
_ROWS = 512  # that are dequantised at once


class MXFP4Source(WeightSource):
    """Over another source: ``w_blocks`` [experts, out, groups, 16] and ``w_scales`` [experts, out, groups] make ``w``.

    It is [experts, in, out]: each number is ``FP4 value * 2 ** (scale - 127)``.
    """

    def __init__(self, stored: WeightSource) -> None:
        self._stored, self.dtype = stored, stored.dtype
        self._packed: set[str] = set()
        self.shapes = dict(stored.shapes)
        for blocks, shape in stored.shapes.items():
            name = blocks.removesuffix("_blocks")
            if name != blocks and len(shape) == 4 and stored.shapes.get(f"{name}_scales") == shape[:3]:
                experts, out, groups, _ = shape
                del self.shapes[blocks], self.shapes[f"{name}_scales"]
                self.shapes[name] = (experts, groups * _GROUP, out)
                self._packed.add(name)

    @property
    def bytes_read(self) -> int:  # type: ignore[override]
        return self._stored.bytes_read

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        if name not in self._packed:
            self._stored.read(name, ranges, out)
            return
        (first, last), (start, stop), (low, high) = ranges
        groups = (start // _GROUP, -(-stop // _GROUP))
        inside = slice(start - groups[0] * _GROUP, stop - groups[0] * _GROUP)
        for expert in range(first, last):
            for row in range(low, high, _ROWS):
                rows = (row, min(row + _ROWS, high))
                values = self._dequantised(name, expert, rows, groups)
                out[expert - first, :, row - low : rows[1] - low].copy_(values[:, inside].T)

    def _dequantised(self, name: str, expert: int, rows: Range, groups: Range) -> Tensor:
        """One expert's rows [rows, in], float32."""
        shape, ranges = (rows[1] - rows[0], groups[1] - groups[0]), ((expert, expert + 1), rows, groups)
        packed, scales = torch.empty(1, *shape, 16, dtype=torch.uint8), torch.empty(1, *shape, dtype=torch.uint8)
        self._stored.read(f"{name}_blocks", (*ranges, (0, 16)), packed)
        self._stored.read(f"{name}_scales", ranges, scales)
        halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)  # [1, rows, groups, 32]
        values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])[halves.int()]
        return torch.ldexp(values, scales.int()[..., None] - 127).view(shape[0], -1)

    def close(self) -> None:
        self._stored.close()
