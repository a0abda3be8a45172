"""Run by test_paged_attention.py: compiles the kernel, from its launcher's own arguments, for a GPU that is not there.

compile_paged_attention.py CAPABILITY CACHE PART: for sm_<CAPABILITY>; triton's cache goes to the folder CACHE; PART:
which half of the work to do.
"""

import os
import sys
from collections import defaultdict
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = sys.argv[2]

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from meshlm.kernels import paged_attention as module
from meshlm.kernels.batch import PagedBatch
from meshlm.kernels.eager import AttentionFeatures

CAPABILITY = int(sys.argv[1])
PART = sys.argv[3]
SHARED_BYTES = {80: 166912, 86: 101376, 90: 232448}[CAPABILITY]
ALL = AttentionFeatures(window=1024, softcap=50.0, sinks=torch.zeros(32), alibi_slopes=torch.zeros(32))


class Driver:
    """What the compiler asks of a machine with one GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def compile_only() -> dict[str, dict[int, int]]:
    """From now on a launch compiles and does not run. Returns each kernel's variants with their shared memory."""
    driver.set_active(Driver())
    module._device = lambda device: (132, SHARED_BYTES)
    launch, compiled = JITFunction.run, defaultdict[str, dict[int, int]](dict)

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert 0 < grid[0] < 2**31 and all(0 < size < 2**16 for size in grid[1:])
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        compiled[self.__name__][id(kernel)] = kernel.metadata.shared
        return kernel

    JITFunction.run = run
    return compiled


def attend(
    lens: list[tuple[int, int]],
    head_dim: int,
    dtype: torch.dtype,
    features: AttentionFeatures = module.PLAIN,
    *,
    latent: int = 0,
) -> None:
    """lens: (new tokens, tokens before them) of each sequence; latent: elements of a key that are its value, if any."""
    query_lens, key_lens = [new for new, _ in lens], [new + context for new, context in lens]
    batch = PagedBatch.of(query_lens, key_lens, [[0] * n for n in key_lens], 16, torch.device("cpu"))
    kv_heads = 1 if latent else 8
    query = torch.zeros(sum(query_lens), 32, head_dim, dtype=dtype)
    keys, values = torch.zeros(2, 1, 16, kv_heads, head_dim, dtype=dtype)
    module.paged_attention(query, keys, keys[..., -latent:] if latent else values, batch, 0.1, features)


def assert_fits(compiled: dict[str, dict[int, int]]) -> None:
    for name, variants in compiled.items():
        assert all(shared <= SHARED_BYTES for shared in variants.values()), f"{name}: {variants} bytes of shared memory"
    assert set(compiled) == {"_attend", "_combine"}


def heads_that_differ(compiled: dict[str, dict[int, int]]) -> None:
    for head_dim, dtype in ((80, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        for features in (module.PLAIN, ALL):
            attend([(1, 5000), (1, 3)], head_dim, dtype, features)
            attend([(200, 0), (1, 5000)], head_dim, dtype, features)
    assert_fits(compiled)


def latents_and_numbers_of_tokens(compiled: dict[str, dict[int, int]]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        attend([(1, 5000), (1, 3)], 576, dtype, latent=512)
        attend([(200, 0), (1, 5000)], 576, dtype, latent=512)
    assert_fits(compiled)
    for mixed in (False, True):
        compiled.clear()
        for count in (1, 2, 3, 16, 33):
            decodes = [(1, 10000 // count - 1)] * count
            attend([*decodes, (100 * count, 0)] if mixed else decodes, 64, torch.bfloat16)
        most = 4 if mixed else 2  # narrow and wide, split and not
        assert len(compiled["_attend"]) <= most and len(compiled["_combine"]) <= 1, "compiled for each number of tokens"


if __name__ == "__main__":
    {"heads": heads_that_differ, "latents": latents_and_numbers_of_tokens}[PART](compile_only())
