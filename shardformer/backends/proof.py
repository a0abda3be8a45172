"""Whether a backend gives what eager gives."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""How far from eager, as a share of the largest value: a few roundings, far below what a wrong mask does."""


def difference(ours: Tensor, expected: Tensor) -> str | None:
    """How far apart the results of two backends are, in words; None where it is rounding."""
    limit = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    error = (ours.float() - expected.float()).abs().max().item()
    if error <= limit:
        return None
    return f"off by {error:.2g} where {limit:.2g} is rounding"  # or by NaN
