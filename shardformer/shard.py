"""How a model is divided over the mesh: the one place.

A split is a list of (start, stop), one for each tp rank, made once from the model's sizes. Linears, attention, KV
cache and weight loading all read the same lists. No split pads, so every size works:

- query and KV heads: with no more ranks than KV heads, whole groups go to ranks (3 KV heads on 2 ranks: 2 + 1); with
  more, the ranks are dealt out to the KV heads and those that share one split its query heads and each keep a copy
  of it (9 query and 3 KV heads on 4 ranks: 2 + 1 query heads of KV head 0, then 3 of head 1, 3 of head 2).
  Either way all KV heads of a rank serve equally many of its query heads.
- intermediate size and vocabulary: nearly equal runs, in units of up to 64 where that keeps them balanced.
"""

from collections.abc import Sequence
from itertools import pairwise

from ..policies import Dim, ModelSpec

Range = tuple[int, int]


def even_split(size: int, parts: int, unit: int = 1) -> list[Range]:
    """`parts` consecutive ranges that cover `size`, their lengths differing by one unit at most, the longer first."""
    units = size // unit
    lengths = [(units // parts + (i < units % parts)) * unit for i in range(parts)]
    lengths[-1] += size - units * unit
    return _ranges(lengths)


def aligned_split(size: int, parts: int) -> list[Range]:
    """An even split in units of the largest power of two, up to 64, that divides size and gives each part 8 or more."""
    unit = 64
    while unit > 1 and (size % unit or size // unit < 8 * parts):
        unit //= 2
    return even_split(size, parts, unit)


def split_heads(num_heads: int, num_kv_heads: int, parts: int) -> tuple[list[Range], list[Range]]:
    """(query heads, KV heads) of each part. Raises ValueError if there are more parts than query heads.

    Nor can query heads be dealt to KV heads that do not divide them.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}: each KV head "
            f"must serve equally many query heads"
        )
    if parts > num_heads:
        raise ValueError(
            f"tp_size={parts} is more than the model's {num_heads} query heads; use tp_size <= {num_heads}"
        )
    group = num_heads // num_kv_heads
    if parts <= num_kv_heads:
        kv_heads = even_split(num_kv_heads, parts)
        return [(start * group, stop * group) for start, stop in kv_heads], kv_heads
    heads, kv_heads = [], []
    for kv_head, (first, last) in enumerate(even_split(parts, num_kv_heads)):
        for start, stop in even_split(group, last - first):
            heads.append((kv_head * group + start, kv_head * group + stop))
            kv_heads.append((kv_head, kv_head + 1))
    return heads, kv_heads


def split_layers(spec: ModelSpec, parts: int) -> list[Range]:
    """The decoder layers of each pipeline stage, so that the slowest stage is as fast as can be.

    Cost is counted in weight elements that a decode step reads: all of a layer's, all of the LM head's on the last
    stage, and of the embedding on the first only one row, since a look-up reads no more. Attention and small ops are
    not counted: on SmolLM2-135M an LM head of 8 layers' size, with the sampler, costs as much as 9 layers. Raises
    ValueError if there are more parts than layers.
    """
    if parts > spec.num_layers:
        raise ValueError(
            f"pp_size={parts} is more than the model's {spec.num_layers} layers; use pp_size <= {spec.num_layers}"
        )
    layer = sum(_num_elements(spec, dims) for _, dims in spec.layer.tensors(""))
    extra = [0] * parts
    extra[0] += spec.hidden_size
    extra[-1] += _num_elements(spec, spec.lm_head.dims) + spec.hidden_size

    # The smallest limit under which the stages can hold all layers, one each at least; stages then fill up to it.
    def capacity(limit: int) -> list[int]:
        return [max(1, (limit - more) // layer) for more in extra]

    low, high = layer, layer * spec.num_layers + sum(extra)
    while low < high:
        middle = (low + high) // 2
        if sum(capacity(middle)) >= spec.num_layers:
            high = middle
        else:
            low = middle + 1
    lengths = capacity(low)
    spare = sum(lengths) - spec.num_layers
    while spare:  # take the surplus from the stage that would be the slowest, the earlier one where they tie
        stage = max((i for i in range(parts) if lengths[i] > 1), key=lambda i: (lengths[i] * layer + extra[i], -i))
        lengths[stage] -= 1
        spare -= 1
    return _ranges(lengths)


class Shards:
    """The splits of one model over `tp_size` ranks."""

    def __init__(self, spec: ModelSpec, tp_size: int) -> None:
        if tp_size > spec.vocab_size or tp_size > spec.intermediate_size:
            raise ValueError(
                f"tp_size={tp_size} is more than the model's vocab_size={spec.vocab_size} or "
                f"intermediate_size={spec.intermediate_size}"
            )
        self.tp_size = tp_size
        self.heads, self.kv_heads = split_heads(spec.num_heads, spec.num_kv_heads, tp_size)
        elements = lambda ranges: [(a * spec.head_dim, b * spec.head_dim) for a, b in ranges]  # noqa: E731
        self._ranges: dict[Dim, list[Range]] = {
            Dim.HIDDEN: [(0, spec.hidden_size)] * tp_size,
            Dim.QUERY: elements(self.heads),
            Dim.KEY_VALUE: elements(self.kv_heads),
            Dim.INTERMEDIATE: aligned_split(spec.intermediate_size, tp_size),
            Dim.VOCABULARY: aligned_split(spec.vocab_size, tp_size),
        }

    def range(self, dim: Dim, rank: int) -> Range:
        """(start, stop) in elements of what tp rank `rank` holds along `dim`."""
        return self._ranges[dim][rank]

    def length(self, dim: Dim, rank: int) -> int:
        start, stop = self.range(dim, rank)
        return stop - start

    def num_elements(self, dims: Sequence[Dim], rank: int) -> int:
        count = 1
        for dim in dims:
            count *= self.length(dim, rank)
        return count


def stage_num_elements(spec: ModelSpec, shards: Shards, layers: Range, tp_rank: int) -> int:
    """Weight elements that a rank holds: its stage's tensors, its slices of them."""
    per_layer = sum(shards.num_elements(dims, tp_rank) for _, dims in spec.layer.tensors(""))
    first, last = layers[0] == 0, layers[1] == spec.num_layers
    count = (layers[1] - layers[0]) * per_layer
    vocabulary = shards.num_elements(spec.embedding.dims, tp_rank)
    count += vocabulary if first else 0
    count += vocabulary if last and not (first and spec.tied_embeddings) else 0
    return count + (spec.hidden_size if last else 0)


def _num_elements(spec: ModelSpec, dims: Sequence[Dim]) -> int:
    count = 1
    for dim in dims:
        count *= spec.size(dim)
    return count


def _ranges(lengths: Sequence[int]) -> list[Range]:
    stops = [0]
    for length in lengths:
        stops.append(stops[-1] + length)
    return list(pairwise(stops))
