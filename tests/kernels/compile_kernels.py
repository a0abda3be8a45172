"""Run by test_ops.py: compiles every kernel, from its launcher's own arguments, for a GPU that need not be there.

compile_kernels.py CAPABILITY CACHE: for sm_<CAPABILITY>; triton's cache goes to the folder CACHE.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_CACHE_DIR"] = sys.argv[2]

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from meshlm.kernels.eager import KINDS
from meshlm.kernels.eager_moe import Routing
from meshlm.kernels.triton_ops import TRITON as ops

CAPABILITY = int(sys.argv[1])


class Driver:
    """What the compiler asks of a machine with one GPU."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def compile_only() -> dict[str, set[int]]:
    """From now on a launch compiles and does not run. Returns each kernel's compiled variants, filled as they come."""
    driver.set_active(Driver())
    launch, compiled = JITFunction.run, defaultdict(set)

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < size < 2**16 for size in grid[1:])
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        compiled[self.__name__].add(id(kernel))
        return kernel

    JITFunction.run = run
    return compiled


def randn(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def norms(num_tokens: int) -> None:
    x, residual, weight = randn(num_tokens, 4096), randn(num_tokens, 4096), randn(4096)
    ops.add_rms_norm(x, residual, weight, 1e-5)
    ops.add_layer_norm(x, residual, weight, weight, 1e-5)


def long_norms(num_tokens: int) -> None:
    x, weight = randn(num_tokens, 20000), randn(20000)
    ops.rms_norm(x, weight, 1e-5, 1.0)
    ops.add_layer_norm(x, x, None, None, 1e-5)


def head_norms(num_tokens: int) -> None:
    heads = randn(num_tokens, 48, 128)[:, :32]
    ops.rms_norm(heads, randn(128), 1e-5)
    ops.head_layer_norm(heads, randn(32, 128), 1e-5)


def activation(kind: str, num_tokens: int) -> None:
    ops.activation(kind)(randn(num_tokens, 14336))


def gated_activation(kind: str, num_tokens: int) -> None:
    ops.gated_activation(kind)(randn(num_tokens, 2 * 14336))


def rotary(num_tokens: int, head_dim: int = 128, width: int = 64, interleaved: bool = False) -> None:
    query, key, value = randn(num_tokens, 48, head_dim).split((32, 8, 8), dim=1)
    cos, sin, places = randn(9, width), randn(9, width), torch.zeros(num_tokens, dtype=torch.int64)
    key_cache, value_cache = randn(2, 5, 16, 8, head_dim)
    ops.rotary_store_kv(query, key, value, cos, sin, places, key_cache, value_cache, places, interleaved)


def partial_rotary(num_tokens: int) -> None:
    rotary(num_tokens, 80, 16, True)


def store(num_tokens: int) -> None:
    key, value, slots = randn(num_tokens, 8, 192), randn(num_tokens, 8, 128), torch.zeros(num_tokens, dtype=torch.int64)
    ops.store_kv(key, value, randn(5, 16, 8, 192), randn(5, 16, 8, 128), slots)


def embedding(num_tokens: int) -> None:
    ops.embedding(torch.zeros(num_tokens, dtype=torch.int64), randn(100, 4096), 50)


def routing(num_tokens: int) -> None:
    logits, correction = randn(num_tokens, 160), torch.zeros(160)
    ops.route(logits, Routing(8, "sigmoid", True, 2.5, 8, 4, "sum of two"), correction)


def experts(num_tokens: int, top_k: int = 2) -> None:
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32)
    plan = ops.plan_experts(ids, 3, 20)
    product = ops.bind_grouped_linear(randn(20, 384, 512))
    rows = product(randn(num_tokens, 512), randn(20, 384), plan, True)
    ops.combine(rows, torch.ones(num_tokens, top_k), plan)


def crowded_experts(num_tokens: int) -> None:
    experts(400 + num_tokens)


def float32_experts(num_tokens: int) -> None:
    plan = ops.plan_experts(torch.zeros(num_tokens, 2, dtype=torch.int32), 0, 20)
    ops.bind_grouped_linear(torch.randn(20, 70, 65))(torch.randn(2 * num_tokens, 65), None, plan, False)


def sampling(num_tokens: int) -> None:
    keys = torch.zeros(num_tokens, 2, dtype=torch.int32)
    ops.counter_noise(keys, torch.arange(512, dtype=torch.int32))
    ops.sample_shard(torch.randn(num_tokens, 32064), torch.ones(num_tokens), keys, 32064)


def masking(num_tokens: int) -> None:
    mask = torch.zeros(num_tokens, 2004, dtype=torch.int32)
    ops.apply_bitmask(torch.randn(num_tokens, 32064), torch.arange(num_tokens), mask, 32064)


STEPS: list[Callable[[int], None]] = [
    norms,
    long_norms,
    head_norms,
    *(partial(activation, kind) for kind in ("relu2", "gelu")),  # the rest is compiled with a gate
    *(partial(gated_activation, kind) for kind in KINDS),
    rotary,
    partial_rotary,
    store,
    embedding,
    routing,
    experts,
    crowded_experts,
    float32_experts,
    sampling,
    masking,
]

if __name__ == "__main__":
    compiled = compile_only()
    for step in STEPS:
        compiled.clear()
        for num_tokens in (1, 2, 3, 16, 40):
            step(num_tokens)
        again = {name: len(variants) for name, variants in compiled.items() if len(variants) > 1}
        assert compiled and not again, f"{step}: compiled more than once: {again}"
