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
from itertools import accumulate, pairwise
from math import prod

from ..policies import Dim, ModelSpec, TensorSpec

Range = tuple[int, int]

_LAYER_OPS = 1_000_000  # elements of weight, reading which takes as long as a layer's ops beside its products


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
    """The decoder layers of each pipeline stage, so that the slowest stage is as fast as can be, and the rest alike.

    Cost is counted in weight elements that a decode step reads: all of a layer's, all of the LM head's on the last
    stage, and of the embedding on the first only one row, since a look-up reads no more; and for a layer's attention
    and small ops `_LAYER_OPS`, as on a CPU: there SmolLM2-135M's LM head, of 8 layers' size, costs with what follows it
    as much as 7 in decodes of 16 short sequences, and less beside longer ones. Raises ValueError if there are more
    parts than layers.
    """
    if parts > spec.num_layers:
        raise ValueError(
            f"pp_size={parts} is more than the model's {spec.num_layers} layers; use pp_size <= {spec.num_layers}"
        )
    if parts > 1 and spec.why_one_stage is not None:
        raise ValueError(
            f"pp_size={parts}: {spec.architecture} cannot be divided into stages ({spec.why_one_stage}); use pp_size=1"
        )
    layers = [_LAYER_OPS + sum(prod(tensor.shape) for tensor in spec.layer_tensors(i)) for i in range(spec.num_layers)]
    costs = [0, *accumulate(layers)]  # of the layers before each
    extra = [0] * parts
    extra[0] += spec.hidden_size
    extra[-1] += sum(prod(tensor.shape) for tensor in spec.head_tensors())

    # best[stop]: (slowest stage, sum of squares, stages' stops) of the best division of the layers before `stop`
    Division = tuple[float, float, tuple[int, ...]]
    best: dict[int, Division] = {0: (0.0, 0.0, ())}
    for part in range(parts):
        found: dict[int, Division] = {}
        for stop in range(part + 1, spec.num_layers - (parts - part - 1) + 1):
            options = []
            for start, (slowest, squares, stops) in best.items():
                if start < stop:
                    cost = float(costs[stop] - costs[start] + extra[part])
                    options.append((max(slowest, cost), squares + cost * cost, (*stops, stop)))
            found[stop] = min(options)
        best = found
    return list(pairwise((0, *best[spec.num_layers][2])))


class Shards:
    """The splits of one model over `tp_size` ranks.

    expert_parallel: whole experts go to ranks; otherwise each expert is split.
    """

    def __init__(self, spec: ModelSpec, tp_size: int, expert_parallel: bool = False) -> None:
        self.tp_size, self.expert_parallel = tp_size, expert_parallel
        self.num_heads, self.num_kv_heads = spec.num_heads, spec.num_kv_heads
        self.heads, self.kv_heads = split_heads(spec.num_heads, spec.num_kv_heads, tp_size)
        if tp_size > 1 and spec.why_undivided is not None:
            raise ValueError(
                f"tp_size={tp_size}: the layers of {spec.architecture} cannot be divided ({spec.why_undivided}); use "
                f"tp_size=1"
            )
        if expert_parallel and not any(Dim.EXPERTS in tensor.dims for tensor in spec.tensors()):
            raise ValueError(f"expert_parallel=True has no effect: {spec.architecture} has no experts; leave it False")
        splits = {Dim.VOCABULARY, Dim.INTERMEDIATE} | (set() if expert_parallel else {Dim.EXPERT_INTERMEDIATE})
        for tensor in spec.tensors() if tp_size > 1 else ():
            for dim, size in zip(tensor.dims, tensor.shape, strict=True):
                if dim in splits and size < tp_size:
                    other = " or expert_parallel=True" if dim is Dim.EXPERT_INTERMEDIATE else ""
                    raise ValueError(
                        f"tp_size={tp_size} is more than the {size} elements of {tensor.name} along its {dim} dim; "
                        f"use tp_size <= {size}{other}"
                    )

    def range(self, dim: Dim, size: int, rank: int) -> Range:
        """(start, stop) of what tp rank `rank` holds along a dim of `size` elements."""
        if dim is Dim.QUERY:
            return _scaled(self.heads[rank], size, self.num_heads)
        if dim is Dim.KEY_VALUE:
            return _scaled(self.kv_heads[rank], size, self.num_kv_heads)
        if dim is Dim.EXPERTS and self.expert_parallel:
            return even_split(size, self.tp_size)[rank]
        if dim in (Dim.INTERMEDIATE, Dim.VOCABULARY) or (dim is Dim.EXPERT_INTERMEDIATE and not self.expert_parallel):
            return aligned_split(size, self.tp_size)[rank]
        return 0, size

    def length(self, dim: Dim, size: int, rank: int) -> int:
        start, stop = self.range(dim, size, rank)
        return stop - start

    def num_elements(self, tensor: TensorSpec, rank: int) -> int:
        return prod(self.length(dim, size, rank) for dim, size in zip(tensor.dims, tensor.shape, strict=True))


def _scaled(units: Range, size: int, num_units: int) -> Range:
    each = size // num_units
    assert each * num_units == size, (size, num_units)
    return units[0] * each, units[1] * each


def stage_bytes(spec: ModelSpec, shards: Shards, layers: Range, tp_rank: int, itemsize: int) -> int:
    """Bytes of weights that a rank holds: its stage's tensors, its slices of them. itemsize: of the model's dtype."""
    held = [tensor for index in range(*layers) for tensor in spec.layer_tensors(index)]
    if layers[0] == 0:
        held += spec.embedding_tensors()
    if layers[1] == spec.num_layers:
        names = {tensor.name for tensor in held}
        held += [tensor for tensor in spec.head_tensors() if tensor.name not in names]
    return sum(shards.num_elements(tensor, tp_rank) * (4 if tensor.float32 else itemsize) for tensor in held)


def _ranges(lengths: Sequence[int]) -> list[Range]:
    return list(pairwise(accumulate(lengths, initial=0)))
