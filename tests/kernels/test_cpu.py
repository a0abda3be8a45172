"""The C++ ops against their eager definitions: odd shapes, strides, empty batches, every element written."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager, select_ops
from meshlm.kernels.batch import PagedBatch
from meshlm.kernels.cpu import CpuOps, Unavailable, build

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # a few roundings of each

try:
    build.load_library()
except Unavailable as reason:  # no compiler, say: the engine falls back to eager, and there is nothing to test
    pytest.skip(f"no C++ ops here: {reason}", allow_module_level=True)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=[1, 2], ids="{}-threads".format)
def ops(request: pytest.FixtureRequest, dtype: torch.dtype) -> Iterator[CpuOps]:
    """The ops on one and on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield CpuOps(dtype)
    torch.set_num_threads(before)


def assert_close(ours: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.float(), exact.float(), rtol=tolerance, atol=tolerance)


def test_select_ops_takes_them(dtype: torch.dtype) -> None:
    assert select_ops(CPU, dtype).name.startswith("C++")


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (5, 576), (300, 129)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(offset: float, shape: tuple[int, int], ops: CpuOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = ((torch.randn(s) * 3).to(dtype) for s in (shape, shape, shape[1:]))
    for stream in (residual, None):
        before = x.clone()
        for ours, exact in zip(
            ops.add_rms_norm(x, stream, weight, 1e-5, offset),
            eager.add_rms_norm(x, stream, weight, 1e-5, offset),
            strict=True,
        ):
            assert ours.shape == exact.shape and ours.dtype == dtype
            assert_close(ours, exact)
        assert torch.equal(x, before)


@pytest.mark.parametrize("parameters", ["weight, bias", "weight", "none"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 17), (5, 576), (300, 129)], ids=str)
def test_add_layer_norm(shape: tuple[int, int], parameters: str, ops: CpuOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, *shape) * 3 + 1).to(dtype)
    weight = torch.randn(shape[1]).to(dtype) if "weight" in parameters else None
    bias = torch.randn(shape[1]).to(dtype) if "bias" in parameters else None
    before = x.clone()
    for stream in (residual, None):
        ours, total = ops.add_layer_norm(x, stream, weight, bias, 1e-5)
        exact, exact_total = eager.add_layer_norm(x, stream, weight, bias, 1e-5)
        assert ours.shape == exact.shape and ours.dtype == dtype
        assert_close(ours, exact)
        assert total is x if stream is None else torch.equal(total, exact_total)
        assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 1), (3, 5, 20), (70, 4, 128)], ids=str)
def test_norms_of_heads(shape: tuple[int, int, int], ops: CpuOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_tokens, heads, head_dim = shape
    x = (torch.randn(num_tokens, heads + 3, head_dim + 5) * 3 + 1).to(dtype)[:, 2:-1, 5:]
    weight = torch.randn(heads, head_dim).to(dtype)
    latent = x[:, 0]  # rows that are not heads, apart from each other as well
    pairs = [
        (ops.head_layer_norm(x, weight, 1e-5), eager.head_layer_norm(x, weight, 1e-5)),
        (ops.rms_norm(x, weight[0], 1e-5), eager.rms_norm(x, weight[0], 1e-5)),
        (ops.rms_norm(x, weight[0], 1e-5, 1.0), eager.rms_norm(x, weight[0], 1e-5, 1.0)),
        (ops.rms_norm(latent, weight[0], 1e-5), eager.rms_norm(latent, weight[0], 1e-5)),
    ]
    for ours, exact in pairs:
        assert ours.shape == exact.shape and ours.dtype == dtype and ours.is_contiguous()
        assert_close(ours, exact)


@pytest.mark.parametrize("kind", eager.KINDS)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 17), (2, 48), (40, 900)], ids=str)
def test_activations(shape: tuple[int, int], kind: str, ops: CpuOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wider = (torch.randn(shape[0], 2 * shape[1] + 3) * 4).to(dtype)
    wider[:, 2:5] = torch.tensor([200.0, -200.0, -9.0], dtype=dtype)  # e^200 and e^-200 are no float32
    before = wider.clone()
    for x in (wider[:, 2:-1], wider[:, : 2 * shape[1]].contiguous()):
        pairs = [(ops.gated_activation(kind)(x), eager.gated_activation(kind)(x.double()))]
        if kind != "swiglu_oai":
            pairs.append((ops.activation(kind)(x), eager.activation(kind)(x.double())))
        for ours, exact in pairs:
            assert ours.shape == exact.shape and ours.dtype == dtype
            assert_close(ours, exact.to(dtype))
    assert torch.equal(wider, before)


def test_gelu_is_as_near_as_torchs(dtype: torch.dtype, ops: CpuOps) -> None:
    """Of what erf gives in float64, over all of its range."""
    x = torch.linspace(-14, 14, 200001).to(dtype).unsqueeze(0)
    exact = x.double() * torch.special.ndtr(x.double())
    ours, torchs = (
        (gelu(x).double() - exact).abs().max() for gelu in (ops.activation("gelu"), torch.nn.functional.gelu)
    )
    assert ours <= torchs


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "width", "value_dim"), [(2, 1, 2), (20, 10, 20), (64, 32, 64), (80, 16, 70), (96, 3, 1), (20, 4, 30)]
)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 130])
def test_rotary_store_kv(
    num_tokens: int, head_dim: int, width: int, value_dim: int, interleaved: bool, ops: CpuOps, dtype: torch.dtype
) -> None:
    """And `store_kv`, which does not rotate."""
    torch.manual_seed(0)
    qkv = torch.randn(num_tokens, 5 + 2, head_dim).to(dtype)
    query, key = qkv.split((5, 2), dim=1)  # not contiguous, as in the model
    value = torch.randn(num_tokens, 3, value_dim + 1).to(dtype)[:, 1:, 1:]
    if num_tokens:
        value[0, 0, 0], value[-1, 1, -1] = float("nan"), float("-inf")
        key[0, 1, 0] = float("inf")
    cos, sin = torch.randn(2, 200, width).to(dtype)
    positions = torch.randint(200, (num_tokens,))
    slots = torch.randperm(60 * 3)[:num_tokens]
    slots[1:2] = -1

    def caches() -> tuple[Tensor, Tensor]:
        return tuple(torch.full((60, 3, 2, dim), 7.0, dtype=dtype) for dim in (head_dim, value_dim))

    (ours, exact), (stored, exactly) = (caches(), caches()), (caches(), caches())
    rotated = ops.rotary_store_kv(query, key, value, cos, sin, positions, *ours, slots, interleaved)
    assert_close(rotated, eager.rotary_store_kv(query, key, value, cos, sin, positions, *exact, slots, interleaved))
    ops.store_kv(key, value, *stored, slots)
    eager.store_kv(key, value, *exactly, slots)
    for one, other in zip(ours, exact, strict=True):
        assert torch.isfinite(one).all()
        assert_close(one, other)
    for one, other in zip(stored, exactly, strict=True):
        assert torch.equal(one, other)


BATCHES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 64), (1, 65), (1, 17), (1, 1)],
    "a long decode, split": [(1, 900), (1, 3)],
    "speculation": [(2, 300), (2, 2), (3, 700)],
    "a prompt": [(150, 150)],
    "a chunk": [(33, 200)],
    "all of it": [(1, 7), (70, 70), (2, 300), (40, 131), (1, 600), (5, 5)],
}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 16), (9, 3, 64, 1), (2, 1, 32, 3), (5, 5, 80, 1), (10, 2, 112, 3), (33, 1, 16, 16), (8, 2, 256, 16)],
)
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_paged_attention(
    batch: str, heads: int, kv_heads: int, head_dim: int, block_size: int, ops: CpuOps, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query_lens, key_lens = zip(*BATCHES[batch], strict=True)
    counts = [-(-length // block_size) for length in key_lens]
    ids = random.Random(0).sample(range(sum(counts) + 2), sum(counts))
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    caches = torch.randn(2, sum(counts) + 2, block_size, kv_heads, head_dim).to(dtype)
    query, scale = torch.randn(sum(query_lens), heads, head_dim).to(dtype), head_dim**-0.5
    ours = ops.paged_attention(query, *caches, PagedBatch.of(query_lens, key_lens, tables, block_size, CPU), scale)
    plan = eager.plan_attention(query_lens, key_lens, tables, block_size, torch.float64, CPU)
    exact = eager.paged_attention(query.double(), *caches.double(), plan, scale)
    assert ours.shape == exact.shape and ours.dtype == dtype
    assert_close(ours, exact)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": 7},
    "a wide window": {"window": 150},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -3.0, 4.0, 100.0])},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.0625, 0.0])},
}
FEATURES["all"] = {name: value for features in FEATURES.values() for name, value in features.items()}


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "in_keys"),
    [(6, 2, 48, 32, False), (6, 2, 32, 80, False), (4, 1, 80, 64, True), (12, 2, 48, 48, True), (3, 1, 576, 512, True)],
)
def test_values(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, in_keys: bool, ops: CpuOps, dtype: torch.dtype
) -> None:
    """Of another size than keys, or a part of them; few rows and many, keys split and not."""
    torch.manual_seed(0)
    query_lens, key_lens = zip(*BATCHES["all of it"], strict=True)
    counts = [-(-length // 3) for length in key_lens]
    ids = random.Random(0).sample(range(sum(counts)), sum(counts))
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    keys = torch.randn(sum(counts), 3, kv_heads, head_dim).to(dtype)
    values = keys[..., -value_dim:] if in_keys else torch.randn(sum(counts), 3, kv_heads, value_dim).to(dtype)
    query, scale = torch.randn(sum(query_lens), heads, head_dim).to(dtype), head_dim**-0.5
    ours = ops.paged_attention(query, keys, values, PagedBatch.of(query_lens, key_lens, tables, 3, CPU), scale)
    plan = eager.plan_attention(query_lens, key_lens, tables, 3, torch.float64, CPU)
    exact = eager.paged_attention(query.double(), keys.double(), values.double(), plan, scale)
    assert ours.shape == exact.shape == (*query.shape[:2], value_dim) and ours.dtype == dtype
    assert_close(ours, exact)


@pytest.mark.parametrize("features", FEATURES)
def test_features(features: str, ops: CpuOps, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = eager.AttentionFeatures(**FEATURES[features])
    query_lens, key_lens = zip(*BATCHES["all of it"], strict=True)
    counts = [-(-length // 16) for length in key_lens]
    ids = list(range(sum(counts)))
    tables = [[ids.pop() for _ in range(count)] for count in counts]
    caches = torch.randn(2, sum(counts), 16, 2, 32).to(dtype)
    query = torch.randn(sum(query_lens), 4, 32).to(dtype)
    ours = ops.paged_attention(query, *caches, PagedBatch.of(query_lens, key_lens, tables, 16, CPU), 0.3, found)
    plan = eager.plan_attention(query_lens, key_lens, tables, 16, torch.float32, CPU, found.window)
    exact = eager.paged_attention(query.float(), *caches.float(), plan, 0.3, found)
    assert_close(ours, exact)


@pytest.mark.parametrize("value_dim", [0, 9, 40])
def test_rotary_store_of_other_values(value_dim: int, ops: CpuOps, dtype: torch.dtype) -> None:
    """Values of another size than keys, and none, which leaves the values' cache alone."""
    torch.manual_seed(0)
    query, key = torch.randn(5, 3, 20).to(dtype).split((2, 1), dim=1)
    value = torch.randn(5, 1, value_dim).to(dtype) if value_dim else None
    cos, sin = torch.randn(2, 50, 8).to(dtype)
    positions, slots = torch.randint(50, (5,)), torch.randperm(12)[:5]
    ours, exact = ([torch.full((4, 3, 1, n), 7.0, dtype=dtype) for n in (20, value_dim or 4)] for _ in range(2))
    rotated = ops.rotary_store_kv(query, key, value, cos, sin, positions, *ours, slots, True)
    assert_close(rotated, eager.rotary_store_kv(query, key, value, cos, sin, positions, *exact, slots, True))
    for one, other in zip(ours, exact, strict=True):
        assert_close(one, other)


def test_paged_attention_of_nothing(ops: CpuOps, dtype: torch.dtype) -> None:
    caches = torch.randn(2, 3, 4, 1, 16).to(dtype)
    out = ops.paged_attention(torch.empty(0, 2, 16, dtype=dtype), *caches, PagedBatch.of([], [], [], 4, CPU), 1.0)
    assert out.shape == (0, 2, 16)


@pytest.mark.parametrize("heads", [2, 12], ids=["few rows", "many rows"])
def test_sequences_without_keys_pad(heads: int, ops: CpuOps, dtype: torch.dtype) -> None:
    """They get zeros, and change nothing for others."""
    caches, query = torch.randn(2, 3, 4, 1, 16).to(dtype), torch.randn(4, heads, 16).to(dtype)
    alone = ops.paged_attention(query[:2], *caches, PagedBatch.of([1, 1], [5, 9], [[2, 1], [1, 0, 2]], 4, CPU), 0.2)
    batch = PagedBatch.of([1, 1, 1, 1], [5, 9, 0, 0], [[2, 1], [1, 0, 2], [], []], 4, CPU)
    padded = ops.paged_attention(query, *caches, batch, 0.2)
    assert torch.equal(padded[:2], alone) and torch.equal(padded[2:], torch.zeros_like(padded[2:]))


def test_large_scores_do_not_overflow(ops: CpuOps, dtype: torch.dtype) -> None:
    """Attention to one key alone, by scores of thousands; both forms."""
    caches = torch.zeros(2, 40, 1, 1, 16).to(dtype)
    caches[0, 3] = 100.0
    caches[1, 3] = 2.0
    for count in (1, 30):
        query = torch.full((count, 1, 16), 100.0, dtype=dtype)
        batch = PagedBatch.of([count], [40], [list(range(40))], 1, CPU)
        assert torch.equal(ops.paged_attention(query, *caches, batch, 1.0), torch.full_like(query, 2.0))


def fresh(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As in a new process of a user whose cache is empty."""
    monkeypatch.setenv("MESHLM_CACHE", str(cache))
    monkeypatch.setattr(build, "load_library", build.load_library.__wrapped__)
    monkeypatch.setattr(build, "_try_load", build._try_load.__wrapped__)


@pytest.mark.slow  # a compiler
def test_it_is_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh(monkeypatch, tmp_path)
    build.load_library()
    (made,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    build.load_library()
    assert [made] == list((tmp_path / "kernels").iterdir())


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [("/nonexistent/compiler", "No such file or directory: '/nonexistent/compiler'"), ("false", "false failed")],
)
def test_without_a_compiler_the_reason_is_told(
    compiler: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh(monkeypatch, tmp_path)
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(Unavailable, match=expected):
        build.load_library()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    monkeypatch.setattr("meshlm.kernels.cpu.functions.load_library", build.load_library)
    assert expected in select_ops(CPU, torch.float32).name and select_ops(CPU, torch.float32).name.startswith("eager (")
