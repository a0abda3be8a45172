"""How kernels that work on whole rows (norms) cut their input into programs, and read it."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 16384  # elements of a row that a program holds at once: 32 a thread
_SMALL_TILE = 1024  # short rows go to one program together, up to this many elements


@dataclass(frozen=True)
class RowTiles:
    """A program takes `rows` rows, `block` columns at a time; both are powers of two."""

    rows: int
    block: int
    num_programs: int
    num_warps: int

    @classmethod
    def of(cls, x: Tensor) -> "RowTiles":
        """x: [outer, inner, hidden], its rows being those of both dims."""
        num_rows, hidden = x.shape[0] * x.shape[1], x.shape[2]
        block = min(power_of_two(hidden), _MAX_BLOCK)
        rows = max(1, _SMALL_TILE // block)
        return cls(rows, block, -(-num_rows // rows), max(1, min(16, rows * block // 512)))


def power_of_two(n: int) -> int:
    """The lowest that is n or more; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """[..., hidden] as [outer, inner, hidden]: a view for up to two leading dims, whatever their strides.

    (Two, since the heads of a product that holds queries, keys and values do not follow one another evenly.)
    """
    assert x.stride(-1) == 1 or x.shape[-1] == 1, f"a row's elements lie {x.stride(-1)} apart"
    return x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])


@triton.jit
def summed(x: tl.tensor, residual: tl.tensor, x_at: tl.tensor, residual_at: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """x + residual, rounded to x's dtype, in float32."""
    total = tl.load(x + x_at, mask=mask, other=0.0)
    if residual is not None:
        added = total.to(tl.float32) + tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
        total = added.to(total.dtype)
    return total.to(tl.float32)
