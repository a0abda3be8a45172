"""How dims, heads and layers are divided."""

from itertools import combinations, pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.policies import DecoderSpec, Dim, ModelSpec, find_policy
from meshlm.shardformer.checkpoint import read_rotary
from meshlm.shardformer.shard import (
    Range,
    Shards,
    aligned_split,
    even_split,
    split_heads,
    split_layers,
    stage_bytes,
)
from tiny import llama_config


def make_spec(**values: Any) -> DecoderSpec:
    config = llama_config(**{"num_hidden_layers": 5, **values})
    return find_policy(["LlamaForCausalLM"]).spec(config, read_rotary)


def assert_tiles(ranges: list[Range], size: int) -> None:
    assert ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(stop == start for (_, stop), (start, _) in pairwise(ranges))


# ---- sizes ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 20))
def test_an_even_split_tiles_and_differs_by_one(size: int, parts: int) -> None:
    ranges = even_split(size, parts)
    assert len(ranges) == parts
    assert_tiles(ranges, size)
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@given(st.integers(1, 5000), st.integers(1, 20))
def test_an_aligned_split_tiles_in_its_units(size: int, parts: int) -> None:
    ranges = aligned_split(size, parts)
    assert len(ranges) == parts
    assert_tiles(ranges, size)
    lengths = [stop - start for start, stop in ranges]
    units = [u for u in (64, 32, 16, 8, 4, 2, 1) if size % u == 0 and (u == 1 or size // u >= 8 * parts)]
    assert all(length % units[0] == 0 for length in lengths)
    assert max(lengths) - min(lengths) <= units[0]
    if size >= parts:
        assert min(lengths) >= 1


def test_splits_of_the_demo_model() -> None:
    assert aligned_split(1536, 3) == [(0, 512), (512, 1024), (1024, 1536)]
    assert aligned_split(49152, 4) == [(0, 12288), (12288, 24576), (24576, 36864), (36864, 49152)]
    assert aligned_split(101, 2) == [(0, 51), (51, 101)]


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (1, ([(0, 9)], [(0, 3)])),
        (2, ([(0, 6), (6, 9)], [(0, 2), (2, 3)])),
        (3, ([(0, 3), (3, 6), (6, 9)], [(0, 1), (1, 2), (2, 3)])),
        (4, ([(0, 2), (2, 3), (3, 6), (6, 9)], [(0, 1), (0, 1), (1, 2), (2, 3)])),
        (5, ([(0, 2), (2, 3), (3, 5), (5, 6), (6, 9)], [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3)])),
        (7, ([(0, 1), (1, 2), (2, 3), (3, 5), (5, 6), (6, 8), (8, 9)], [(0, 1)] * 3 + [(1, 2)] * 2 + [(2, 3)] * 2)),
        (9, ([(i, i + 1) for i in range(9)], [(i // 3, i // 3 + 1) for i in range(9)])),
    ],
)
def test_nine_query_and_three_kv_heads(parts: int, expected: tuple[list[Range], list[Range]]) -> None:
    assert split_heads(9, 3, parts) == expected


SHAPES = [(9, 3), (32, 8), (32, 32), (8, 1), (12, 4), (14, 2), (28, 4), (64, 8), (6, 6), (1, 1), (15, 5)]


@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(h, k, p) for h, k in SHAPES for p in range(1, h + 1)])
def test_every_query_head_once_with_its_kv_head(heads: int, kv_heads: int, parts: int) -> None:
    group = heads // kv_heads
    query, kv = split_heads(heads, kv_heads, parts)
    assert len(query) == len(kv) == parts
    assert_tiles(query, heads)
    assert {h for start, stop in kv for h in range(start, stop)} == set(range(kv_heads))
    for (start, stop), (first, last) in zip(query, kv, strict=True):
        held = stop - start
        assert held > 0 and held % (last - first) == 0, "every KV head of a rank serves equally many query heads"
        for i in range(held):  # the backend's rule: local query head i reads local KV head i // local group
            assert first + i // (held // (last - first)) == (start + i) // group
    if parts <= kv_heads:
        assert_tiles(kv, kv_heads)


def test_more_ranks_than_query_heads_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        split_heads(9, 3, 10)
    assert str(error.value) == "tp_size=10 is more than the model's 9 query heads; use tp_size <= 9"


@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(4, 3, 1), (4, 3, 2), (2, 4, 1), (4, 0, 1)])
def test_kv_heads_that_do_not_divide_the_query_heads_are_refused(heads: int, kv_heads: int, parts: int) -> None:
    with pytest.raises(ValueError) as error:
        split_heads(heads, kv_heads, parts)
    assert str(error.value) == (
        f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}: each KV head must serve "
        f"equally many query heads"
    )


def test_more_ranks_than_vocabulary_or_intermediate_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tp_size=4 is more than the 3 elements of .*gate.* along its intermediate dim"
    ):
        Shards(make_spec(intermediate_size=3), 4)
    with pytest.raises(
        ValueError, match=r"tp_size=3 is more than the 2 .*embed_tokens.* vocabulary dim; use tp_size <= 2"
    ):
        Shards(make_spec(vocab_size=2), 3)


# ---- layers ---------------------------------------------------------------------------------------------------------


def stage_costs(spec: ModelSpec, ranges: list[Range]) -> list[int]:
    """What a decode step costs each stage, in weight elements."""
    sizes = {name: prod(shape) for name, shape in spec.shapes().items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    costs = [(stop - start) * (layer + 1_000_000) for start, stop in ranges]
    costs[0] += spec.hidden_size
    costs[-1] += spec.vocab_size * spec.hidden_size + spec.hidden_size
    return costs


@pytest.mark.parametrize("vocab_size", [10, 5000, 40000, 400_000])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 9])
def test_layers_are_balanced_as_well_as_can_be(num_layers: int, vocab_size: int) -> None:
    spec = make_spec(num_hidden_layers=num_layers, vocab_size=vocab_size)
    for parts in range(1, num_layers + 1):
        ranges = split_layers(spec, parts)
        assert len(ranges) == parts and all(stop > start for start, stop in ranges)
        assert_tiles(ranges, num_layers)
        best = min(
            max(stage_costs(spec, list(pairwise((0, *cuts, num_layers)))))
            for cuts in combinations(range(1, num_layers), parts - 1)
        )
        assert max(stage_costs(spec, ranges)) == best


def test_the_lm_head_takes_layers_off_the_last_stage() -> None:
    demo = make_spec(
        hidden_size=576, intermediate_size=1536, vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True
    )
    assert split_layers(demo, 2) == [(0, 18), (18, 30)]
    lengths = [stop - start for start, stop in split_layers(demo, 4)]
    assert lengths[-1] == min(lengths) and max(lengths) - min(lengths[:-1]) <= 1


def test_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        split_layers(make_spec(), 6)
    assert str(error.value) == "pp_size=6 is more than the model's 5 layers; use pp_size <= 5"


# ---- both together --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_ranks_hold_the_model_and_what_they_must_have_twice(tp_size: int, bias: bool, tied: bool) -> None:
    """With no more ranks than KV heads, only norms, biases after a sum and a tied embedding are held twice."""
    spec = make_spec(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    shards = Shards(spec, tp_size)
    whole = sum(prod(tensor.shape) for tensor in spec.tensors())
    replicated = sum(prod(tensor.shape) for tensor in spec.tensors() if set(tensor.dims) == {Dim.HIDDEN})
    for pp_size in (1, 2, 5):
        held = sum(
            stage_bytes(spec, shards, layers, rank, itemsize=1)
            for layers in split_layers(spec, pp_size)
            for rank in range(tp_size)
        )
        twice = replicated * (tp_size - 1)
        if tied and pp_size > 1:
            twice += spec.vocab_size * spec.hidden_size
        assert held == whole + twice


@pytest.mark.parametrize("tp_size", range(1, 10))
def test_query_and_kv_elements_follow_the_heads(tp_size: int) -> None:
    spec = make_spec(head_dim=6)
    shards = Shards(spec, tp_size)
    for rank in range(tp_size):
        assert shards.range(Dim.QUERY, 54, rank) == tuple(6 * h for h in shards.heads[rank])
        assert shards.range(Dim.KEY_VALUE, 18, rank) == tuple(6 * h for h in shards.kv_heads[rank])
        assert shards.range(Dim.HIDDEN, 36, rank) == (0, 36)
        assert shards.length(Dim.QUERY, 54, rank) == 6 * (shards.heads[rank][1] - shards.heads[rank][0])
