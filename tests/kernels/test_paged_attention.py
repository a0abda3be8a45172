"""Attention over the paged cache: its definition against formulas and transformers, the Triton kernel against it."""

import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshlm.kernels import eager
from meshlm.kernels.batch import PagedBatch
from meshlm.kernels.eager import AttentionFeatures

pytest.importorskip("triton")

from meshlm.kernels import paged_attention as kernel
from meshlm.kernels.paged_attention import Heads, Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.cuda)  # the interpreter multiplies its bits
SMALL = Tile(rows=16, keys=16, num_warps=4, num_stages=2, min_split=16)
NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.empty and empty_like give is NaN: an element that nothing writes shows."""

    def poisoned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **options: Any) -> Tensor:
            out = function(*args, **options)
            return out.fill_(NAN) if out.is_floating_point() else out

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "window, sinks": {"window": 20, "sinks": True},
    "window, softcap": {"window": 9, "softcap": 3.0},
    "all": {"window": 12, "softcap": 2.0, "sinks": True, "alibi": True},
}


class Step:
    """Random sequences whose blocks lie anywhere in the caches, among garbage."""

    def __init__(
        self,
        lens: Sequence[tuple[int, int]],
        heads: tuple[int, int] = (6, 2),
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        *,
        value_dim: int | None = None,
        in_keys: bool = False,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
        device: torch.device = DEVICE,
    ) -> None:
        """lens: (new tokens, tokens before them) of each sequence; heads: of queries, of keys and values; in_keys: each
        value is the last elements of its key."""
        value_dim = value_dim or head_dim
        generator = torch.Generator(device).manual_seed(7)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        self.heads, self.kv_heads = heads
        self.query_lens = [new for new, _ in lens]
        self.key_lens = [new + context for new, context in lens]
        self.block_size, self.scale, self.device = block_size, head_dim**-0.5, device
        self.query = randn(sum(self.query_lens), self.heads, head_dim) * 2
        self.keys = [randn(n, self.kv_heads, head_dim) for n in self.key_lens]
        self.values = [randn(n, self.kv_heads, value_dim) for n in self.key_lens]
        if in_keys:
            self.values = [keys[..., -value_dim:] for keys in self.keys]
        counts = [-(-n // block_size) for n in self.key_lens]
        num_blocks = sum(counts) + 3
        order = random.Random(7).sample(range(num_blocks), num_blocks)
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.in_keys = in_keys
        self.key_cache = randn(num_blocks, block_size, self.kv_heads, head_dim)
        self.value_cache = randn(num_blocks, block_size, self.kv_heads, value_dim)
        if in_keys:
            self.value_cache = self.key_cache[..., -value_dim:]
        self.is_used = torch.zeros(num_blocks, block_size, dtype=torch.bool, device=device)
        for table, keys, values in zip(self.tables, self.keys, self.values, strict=True):
            positions = torch.arange(len(keys), device=device)
            blocks = torch.tensor(table, dtype=torch.int64, device=device)[positions // block_size]
            places = blocks, positions % block_size
            self.key_cache[places], self.value_cache[places], self.is_used[places] = keys, values, True
        self.features = AttentionFeatures(
            window=window,
            softcap=softcap,
            sinks=randn(self.heads) if sinks else None,
            alibi_slopes=torch.rand(self.heads, generator=generator, device=device) if alibi else None,
        )

    def batch(self) -> PagedBatch:
        return PagedBatch.of(self.query_lens, self.key_lens, self.tables, self.block_size, self.device)

    def defined(self) -> Tensor:
        """By the definition, in float32."""
        plan = eager.plan_attention(
            self.query_lens,
            self.key_lens,
            self.tables,
            self.block_size,
            torch.float32,
            self.device,
            self.features.window,
        )
        query, keys, values = (x.float() for x in (self.query, self.key_cache, self.value_cache))
        if self.in_keys:
            values = keys[..., -values.shape[-1] :]
        return eager.paged_attention(query, keys, values, plan, self.scale, self.features)

    def ours(self, batch: PagedBatch | None = None, **options: Any) -> Tensor:
        """By the kernel; what is none of the sequences' keys is NaN."""
        used = self.is_used[..., None, None]
        keys, values = (cache.masked_fill(~used, NAN) for cache in (self.key_cache, self.value_cache))
        if self.in_keys:
            values = keys[..., -values.shape[-1] :]
        batch = self.batch() if batch is None else batch
        return kernel.paged_attention(self.query, keys, values, batch, self.scale, self.features, **options)

    def exact(self) -> Tensor:
        """One query and one head at a time, in float64."""
        features = self.features
        out, row = torch.empty(*self.query.shape[:2], self.value_cache.shape[-1], dtype=torch.float64), 0
        for new, length, keys, values in zip(self.query_lens, self.key_lens, self.keys, self.values, strict=True):
            for position in range(length - new, length):
                first = 0 if features.window is None else max(0, position - features.window + 1)
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    scores = []
                    for place in range(first, position + 1):
                        score = float(keys[place, kv_head].double() @ self.query[row, head].double()) * self.scale
                        if features.softcap is not None:
                            score = features.softcap * math.tanh(score / features.softcap)
                        if features.alibi_slopes is not None:
                            score -= float(features.alibi_slopes[head]) * (position - place)
                        scores.append(score)
                    total = sum(map(math.exp, scores))
                    if features.sinks is not None:
                        total += math.exp(float(features.sinks[head]))
                    weights = torch.tensor([math.exp(score) / total for score in scores], dtype=torch.float64)
                    out[row, head] = weights @ values[first : position + 1, kv_head].double().cpu()
                row += 1
        return out


def assert_close(ours: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ---- the definition -------------------------------------------------------------------------------------------------

SHORT_MIXES: dict[str, list[tuple[int, int]]] = {
    "prompts": [(9, 0), (1, 0), (17, 0)],
    "chunks": [(5, 11), (2, 1)],
    "decodes": [(1, 10), (1, 3), (1, 40), (1, 39), (1, 0)],
}


@pytest.mark.parametrize("mix", SHORT_MIXES)
@pytest.mark.parametrize("features", [name for name in FEATURES if name != "plain"])
def test_definition(features: str, mix: str) -> None:
    step = Step(SHORT_MIXES[mix], (4, 2), 4, 3, **FEATURES[features], device=torch.device("cpu"))
    assert_close(step.defined(), step.exact())


VALUES: dict[str, dict[str, Any]] = {
    "smaller values": {"value_dim": 3},
    "larger values": {"value_dim": 9},
    "values in keys": {"value_dim": 5, "in_keys": True},
    "values that are keys": {"in_keys": True},
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("features", ["plain", "all"])
def test_definition_of_values(features: str, values: str) -> None:
    lens = [n for mix in SHORT_MIXES.values() for n in mix]
    step = Step(lens, (4, 2), 7, 3, **VALUES[values], **FEATURES[features], device=torch.device("cpu"))
    assert eager.values_in_keys(step.key_cache, step.value_cache) == values.startswith("values")
    assert_close(step.defined(), step.exact())


@pytest.mark.parametrize("name", ["window", "softcap", "sinks", "alibi"])
def test_a_feature_makes_a_difference(name: str) -> None:
    plain, featured = Step([(9, 0)], (4, 2), 4, 3), Step([(9, 0)], (4, 2), 4, 3, **FEATURES[name])
    assert torch.equal(plain.query, featured.query)
    assert (plain.defined() - featured.defined()).abs().max() > 0.1


NEW, CONTEXT = 5, 8  # of one sequence, for transformers


def as_transformers(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value [1, heads, tokens, head_dim] and the causal mask [1, 1, NEW, NEW + CONTEXT], True: seen."""
    query, key, value = (x.transpose(0, 1)[None] for x in (step.query, step.keys[0], step.values[0]))
    seen = torch.arange(NEW + CONTEXT) <= torch.arange(CONTEXT, CONTEXT + NEW)[:, None]
    return query, key, value, seen[None, None]


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


def one_sequence(**features: Any) -> Step:
    return Step([(NEW, CONTEXT)], (6, 2), 8, 4, **features, device=torch.device("cpu"))


def test_softcap_is_gemma2s() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    step = one_sequence(softcap=1.5)
    query, key, value, seen = as_transformers(step)
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    theirs, _ = eager_attention_forward(
        module, query, key, value, additive(seen), scaling=step.scale, softcap=step.features.softcap
    )
    assert_close(step.defined(), theirs[0])


def test_sinks_are_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    step = one_sequence(sinks=True)
    query, key, value, seen = as_transformers(step)
    module = SimpleNamespace(num_key_value_groups=3, training=False, sinks=step.features.sinks)
    theirs, _ = eager_attention_forward(module, query, key, value, additive(seen), scaling=step.scale)
    assert_close(step.defined(), theirs[0])


def test_the_window_is_mistrals() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function
    from transformers.models.mistral.modeling_mistral import eager_attention_forward

    step = one_sequence(window=4)
    query, key, value, _ = as_transformers(step)
    positions, places = torch.arange(CONTEXT, CONTEXT + NEW)[:, None], torch.arange(NEW + CONTEXT)
    seen = sliding_window_causal_mask_function(4)(0, 0, positions, places)[None, None]
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    theirs, _ = eager_attention_forward(module, query, key, value, additive(seen), scaling=step.scale)
    assert_close(step.defined(), theirs[0])


def test_alibi_is_blooms() -> None:
    from transformers import BloomConfig
    from transformers.models.bloom import modeling_bloom as bloom

    step = Step([(NEW, CONTEXT)], (6, 6), 8, 4, alibi=True, device=torch.device("cpu"))
    slopes = bloom.build_alibi_tensor(torch.ones(1, 2), 6, torch.float32)[:, 0, 1]
    step.features = replace(step.features, alibi_slopes=slopes)
    query, key, value, seen = as_transformers(step)
    attention = bloom.BloomAttention(BloomConfig(hidden_size=48, n_head=6), layer_idx=0).eval()
    attention.query_key_value, attention.dense = nn.Identity(), nn.Identity()
    attention._reshape = lambda fused: (query, key, value)
    alibi = bloom.build_alibi_tensor(torch.ones(1, NEW + CONTEXT), 6, torch.float32)
    hidden = torch.zeros(1, NEW, 48)
    theirs, _ = attention(hidden, hidden, alibi, additive(seen))
    assert_close(step.defined(), theirs[0].view(NEW, 6, 8))


# ---- the kernel -----------------------------------------------------------------------------------------------------

MIXES: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 0)],
    "decodes": [(1, 3), (1, 47), (1, 16), (1, 15), (1, 0)],
    "a prompt": [(37, 0)],
    "prompts and chunks": [(40, 0), (3, 0), (35, 13)],
    "drafts": [(4, 20), (3, 64), (4, 0)],  # decodes with some speculative tokens
    "everything": [(1, 20), (45, 0), (1, 3), (38, 17), (2, 30), (1, 33)],
}


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1), (9, 1)], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, heads: tuple[int, int]) -> None:
    step = Step(MIXES[mix], heads)
    assert_close(step.ours(), step.defined())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 112, 128, 256])
def test_head_sizes(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    step = Step([(1, 33), (19, 4)], (4, 1), head_dim, block_size, dtype)
    out = step.ours()
    assert out.dtype == dtype and out.shape == step.query.shape
    assert_close(out, step.defined(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "in_keys"),
    [(24, 16, False), (48, 130, False), (40, 24, True), (32, 32, True), (192, 128, False), (576, 512, True)],
)
def test_value_sizes(head_dim: int, value_dim: int, in_keys: bool, dtype: torch.dtype) -> None:
    step = Step([(1, 33), (19, 4)], (5, 1), head_dim, 3, dtype, value_dim=value_dim, in_keys=in_keys)
    out = step.ours()
    assert out.dtype == dtype and out.shape == (*step.query.shape[:2], value_dim)
    assert_close(out, step.defined(), dtype)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("values", [{"value_dim": 9}, {"value_dim": 10, "in_keys": True}], ids=str)
def test_values_with_features(values: dict[str, Any], num_splits: int) -> None:
    step = Step([(1, 40), (7, 28), (1, 5)], (4, 2), 16, 3, **values, **FEATURES["all"])
    assert_close(step.ours(num_splits=num_splits, tiles=(SMALL, SMALL)), step.defined())


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("mix", ["decodes", "chunk"])
@pytest.mark.parametrize("features", FEATURES)
def test_features(features: str, mix: str, num_splits: int) -> None:
    lens = {"decodes": [(1, 40), (1, 5), (1, 0)], "chunk": [(7, 28), (1, 18)]}[mix]
    step = Step(lens, (3, 1), 16, 3, **FEATURES[features])
    assert_close(step.ours(num_splits=num_splits, tiles=(SMALL, SMALL)), step.defined())


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16], ids=str)
def test_features_in_half_precision(dtype: torch.dtype) -> None:
    step = Step([(1, 40), (11, 9)], (4, 1), 32, 16, dtype, **FEATURES["all"])
    assert_close(step.ours(), step.defined(), dtype)


@pytest.mark.parametrize("num_splits", [2, 7, 40])
def test_many_splits(num_splits: int) -> None:
    """More than there are keys for, and more than are put together at a time."""
    step = Step([(1, 600), (1, 0), (5, 60)], (2, 1), 16, 4)
    assert_close(step.ours(num_splits=num_splits, tiles=(SMALL, SMALL)), step.defined())


def test_tiles_do_not_matter() -> None:
    step = Step([(1, 20), (30, 13), (2, 30)], (6, 2))
    expected = step.defined()
    for narrow, wide in ((16, 64), (32, 16)):
        for keys in (16, 64):
            tiles = replace(SMALL, rows=narrow, keys=keys), replace(SMALL, rows=wide, keys=keys)
            assert_close(step.ours(tiles=tiles), expected)


def test_queries_between_others_in_memory() -> None:
    """A query is a part of one product with keys and values, as a rule."""
    step = Step(MIXES["decodes"])
    expected = step.defined()
    step.query = torch.cat((step.query, step.query.roll(1), step.query), dim=1)[:, : step.heads]
    assert not step.query.is_contiguous()
    assert_close(step.ours(), expected)


def test_an_empty_batch() -> None:
    step = Step([])
    assert step.ours().shape == (0, 6, 32)


@pytest.mark.parametrize("num_splits", [None, 3])
@pytest.mark.parametrize("features", ["plain", "all"])
def test_a_sequence_without_keys_gives_zeros(features: str, num_splits: int | None) -> None:
    """As pads a captured graph; a sequence without queries has nothing to give."""
    step = Step([(1, 30), (1, 0), (20, 30), (1, 0)], (6, 2), 16, **FEATURES[features])
    expected = step.defined()
    expected[[1, -1]] = 0
    step.key_lens = [31, 0, 50, 0, 12]
    step.query_lens, step.tables = [*step.query_lens, 0], [*step.tables, step.tables[0]]
    assert_close(step.ours(num_splits=num_splits, tiles=(SMALL, SMALL)), expected)


def test_a_graph_for_longer_sequences() -> None:
    """What was captured knows other numbers, larger ones, but the tensors are the step's."""
    step = Step([(1, 40), (1, 7), (1, 0)], (6, 2), 16)
    batch = replace(step.batch(), max_key_len=4096, num_keys=3 * 4096)
    assert_close(step.ours(batch, num_splits=5, tiles=(SMALL, SMALL)), step.defined())


def test_a_sequence_alone() -> None:
    """Each sequence alone gives the same: none reads another's keys."""
    step = Step([(1, 20), (20, 0), (1, 33)], (4, 2), 16)
    together = step.ours(num_splits=1)
    start = 0
    for i, count in enumerate(step.query_lens):
        alone = PagedBatch.of([count], [step.key_lens[i]], [step.tables[i]], step.block_size, step.device)
        rows = slice(start, start + count)
        out = kernel.paged_attention(
            step.query[rows], step.key_cache, step.value_cache, alone, step.scale, num_splits=1
        )
        assert_close(out, together[rows])
        start += count


# ---- what is launched -----------------------------------------------------------------------------------------------


def test_tile_sizes() -> None:
    for shared_bytes in (232448, 166912, 101376, 65536):
        for dtype in (torch.float32, torch.float16):
            for head_dim in (16, 64, 80, 128, 256):
                for rows in (1, 4, 17, 64, 65, 4000):
                    tile = kernel.tile_sizes(rows, Heads.of(head_dim), dtype, shared_bytes)
                    assert tile.rows in (16, 32, 64, 128) and tile.keys in (16, 32, 64)
                    assert tile.rows >= min(rows, 32)
                    dim = 1 << (head_dim - 1).bit_length()
                    assert (tile.rows + 2 * tile.keys) * dim * dtype.itemsize <= shared_bytes
            for rows in (1, 16, 128, 4000) if shared_bytes > 100_000 else ():  # what GPUs have that Triton compiles for
                tile = kernel.tile_sizes(rows, Heads.of(576, 512, True), dtype, shared_bytes)
                assert (tile.rows + tile.keys) * 576 * dtype.itemsize <= shared_bytes


def test_splits_fill_the_device() -> None:
    splits = kernel._choose_splits
    assert splits(8, 1, 264, False) == 1, "short contexts are not split"
    assert splits(8, 128, 264, False) * 8 > 0.85 * 264, "a batch of one fills the device"
    assert splits(8 * 300, 128, 264, False) == 1, "a large batch fills it anyway"
    assert splits(200, 128, 264, True) == 1 and splits(16, 128, 264, True) > 8
    for programs in range(1, 1200, 37):
        for most in (1, 3, 64, 1000):
            count = splits(programs, most, 264, False)
            assert 1 <= count <= min(most, 256)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90])  # 80 takes as long again
def test_compiles(capability: int, tmp_path: Path) -> None:
    """For GPUs that need not be there, from the launcher's own arguments, and once for all numbers of tokens."""
    script = Path(__file__).with_name("compile_paged_attention.py")
    halves = [
        subprocess.Popen(
            [sys.executable, str(script), str(capability), str(tmp_path), part],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in ("heads", "latents")
    ]
    for half in halves:
        told, _ = half.communicate(timeout=300)
        assert half.returncode == 0, told


# ---- on a GPU -------------------------------------------------------------------------------------------------------

REAL: dict[str, list[tuple[int, int]]] = {
    "one decode": [(1, 9000)],
    "decodes": [(1, 300 + 61 * i) for i in range(48)],
    "one long among short": [(1, 20000), *((1, 50) for _ in range(60))],
    "prompts": [(700, 0), (2000, 0), (33, 0)],
    "a chunk far along": [(512, 12000)],
    "everything": [(1, 2000), (600, 0), (1, 30), (300, 3000), (5, 4000), *((1, 777) for _ in range(20))],
}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("mix", ["decodes", "one decode", "everything"])
def test_real_latents(mix: str, heads: int, dtype: torch.dtype) -> None:
    step = Step(REAL[mix], (heads, 1), 576, 64, dtype, value_dim=512, in_keys=True)
    assert_close(step.ours(), step.defined(), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((14, 2), 64), ((8, 4), 256), ((9, 1), 80)], ids=str)
@pytest.mark.parametrize("mix", REAL)
def test_real_sizes(mix: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    step = Step(REAL[mix], heads, head_dim, 16, dtype)
    assert_close(step.ours(), step.defined(), dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("features", ["plain", "all"])
def test_in_a_cuda_graph(features: str) -> None:
    """Captured with the longest sequences in mind, replayed with others."""
    step = Step([(1, 4000), (1, 70), (1, 1500), (1, 0)], (8, 2), 64, dtype=torch.float16, **FEATURES[features])
    used = step.is_used[..., None, None]
    keys, values = (cache.masked_fill(~used, NAN) for cache in (step.key_cache, step.value_cache))
    batch = replace(step.batch(), max_key_len=8192, num_keys=4 * 8192)
    static = replace(batch, key_lens=batch.key_lens.clone())
    run = lambda: kernel.paged_attention(step.query, keys, values, static, step.scale, step.features)  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for lens in (step.key_lens, [60, 71, 0, 1]):
        static.key_lens.copy_(torch.tensor(lens))
        graph.replay()
        step.key_lens = [max(n, 1) for n in lens]
        expected = step.defined()
        expected[torch.tensor(lens) == 0] = 0
        assert_close(out, expected, torch.float16)


@pytest.mark.cuda
def test_the_host_does_not_wait() -> None:
    step = Step(REAL["everything"], (8, 2), 64, dtype=torch.float16)
    batch = step.batch()
    caches = step.key_cache, step.value_cache
    kernel.paged_attention(step.query, *caches, batch, step.scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.paged_attention(step.query, *caches, batch, step.scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
