"""What a mesh costs a model beside weights and cache, from its declaration alone: memory of a step, bytes moved between
ranks, parts that are not equal."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..config import InferenceConfig
from ..policies import DecoderSpec, Dim, GenericSpec, ModelSpec, MoESpec, MultiHeadSpec, QKNorm, Residual, TensorSpec
from ..policies.generic import STYLES
from ..shardformer.shard import Range, Shards
from .step import MAX_DRAFTS

_NEARLY = 1.05  # times the smallest part, up to which parts are as good as equal
_DIM_NAMES = {
    Dim.INTERMEDIATE: "intermediate elements",
    Dim.EXPERT_INTERMEDIATE: "elements of an expert",
    Dim.EXPERTS: "experts",
    Dim.VOCABULARY: "tokens of the vocabulary",
}


# ---- memory ----------------------------------------------------------------------------------------------------------


def activation_bytes(
    spec: ModelSpec,
    config: InferenceConfig,
    shards: Shards,
    layers: Range,
    tp_rank: int,
    dtype: torch.dtype,
    longest: int,
) -> int:
    """What the largest step takes on a rank, about, and the rotary tables of `longest` positions.

    The widest place counts: four times the hidden states (residual stream, its norm, what goes into a part of a layer
    and what comes out) and what stands between the part's projections; or, on the last stage, logits with the sampler's
    copies of them.
    """
    num_tokens = config.max_num_batched_tokens
    width = max(_width(spec, list(spec.layer_tensors(index)), shards, tp_rank) for index in range(*layers))
    peak = num_tokens * (4 * spec.hidden_size + width) * dtype.itemsize
    if layers[1] == spec.num_layers:
        rows = min(config.max_num_seqs + MAX_DRAFTS, num_tokens)
        logits = rows * shards.length(Dim.VOCABULARY, spec.vocab_size, tp_rank) * (dtype.itemsize + 3 * 4)
        peak = max(peak, num_tokens * spec.hidden_size * dtype.itemsize + logits)
    rotaries = spec.rotaries if isinstance(spec, DecoderSpec) else ()
    return peak + sum(2 * len(rotary.inv_freq) for rotary in rotaries) * longest * dtype.itemsize


def _width(spec: ModelSpec, layer: Sequence[TensorSpec], shards: Shards, tp_rank: int) -> int:
    """Elements of a token between the projections of a layer: of attention or of its MLP, whichever has more. Each
    matrix makes, or takes, what it has along the dim that is divided."""
    attention = mlp = 0
    top_k = _experts_of_a_token(spec)
    for tensor in layer:
        if len(tensor.shape) < 2:
            continue
        for dim, size in zip(tensor.dims, tensor.shape, strict=True):
            length = shards.length(dim, size, tp_rank)
            if dim in (Dim.QUERY, Dim.KEY_VALUE):
                attention += length
            elif dim is Dim.INTERMEDIATE:
                mlp += length
            elif dim is Dim.EXPERT_INTERMEDIATE:
                mlp += top_k * length
    has_experts = any(Dim.EXPERTS in tensor.dims for tensor in layer)
    return max(attention, mlp + has_experts * top_k * spec.hidden_size)


def _experts_of_a_token(spec: ModelSpec) -> int:
    if isinstance(spec, DecoderSpec):
        return max((layer.mlp.router.top_k for layer in spec.layers if isinstance(layer.mlp, MoESpec)), default=1)
    return int(getattr(spec.config, "num_experts_per_tok", None) or 1) if isinstance(spec, GenericSpec) else 1


# ---- what moves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that move between the ranks of a replica for one token, over all links together.

    A sum of b bytes over tp ranks moves 2 (tp - 1) b, as a ring does it; a gather of b bytes (tp - 1) b. What the
    sampler exchanges, some bytes a drawn token, is left out.
    """

    num_collectives: int  # over tp, one after the other
    tp_bytes: int
    pp_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.tp_bytes + self.pp_bytes


def traffic_of(spec: ModelSpec, pp: int, tp: int, dtype: torch.dtype) -> Traffic:
    """Each tp rank of a stage sends the hidden states, which all of them have, to its counterpart."""
    sums, gathers = collectives(spec, dtype.itemsize) if tp > 1 else ([], [])
    return Traffic(
        num_collectives=len(sums) + len(gathers),
        tp_bytes=(tp - 1) * (2 * sum(sums) + sum(gathers)),
        pp_bytes=(pp - 1) * tp * spec.hidden_size * dtype.itemsize,
    )


def collectives(spec: ModelSpec, itemsize: int) -> tuple[list[int], list[int]]:
    """Bytes of each sum over tp that a token's forward takes, and of what each gather makes whole."""
    if isinstance(spec, DecoderSpec):
        sums = [spec.embedding.tokens.sizes[1] * itemsize]
        for layer in spec.layers:
            sums += [spec.hidden_size * itemsize] * (1 if layer.residual is Residual.PARALLEL else 2)
            if isinstance(layer.attention, MultiHeadSpec) and layer.attention.qk_norm is QKNorm.FULL:
                sums.append(2 * 4)  # float32 sums of squares, of query and key
        return sums, []
    assert isinstance(spec, GenericSpec)
    outputs = {t.name.removesuffix(".weight"): t.shape[0] for t in spec.tensors() if t.name.endswith(".weight")}
    sums, gathers = [spec.embedding_size * itemsize], []
    for name, style in ((name, STYLES[style]) for name, style in spec.styles.items()):
        if style.is_summed or (style.splits_input and name in outputs):
            sums.append(spec.hidden_size * itemsize)
        if style.is_gathered and name in outputs:
            gathers.append(outputs[name] * itemsize)
    return sums, gathers


# ---- what is not even ------------------------------------------------------------------------------------------------


def unevenness(spec: ModelSpec, shards: Shards, stages: Sequence[Range]) -> Iterator[str]:
    """What is not divided into equal parts, and what several ranks hold, in words."""
    tp = shards.tp_size
    if len({_length(part) for part in stages}) > 1:
        yield f"{spec.num_layers} layers as {_parts(stages)}"
    if len({_length(part) for part in shards.heads}) > 1:
        yield f"{spec.num_heads} query heads as {_parts(shards.heads)}"
    if any(kind.is_latent for kind in spec.attention_kinds):
        if tp > 1:
            yield f"each of {tp} ranks caches the latents whole"
    elif tp > spec.num_kv_heads:
        yield f"{spec.num_kv_heads} KV heads on {tp} ranks: each is kept by {_span(Counter(shards.kv_heads).values())}"
    elif len({_length(part) for part in shards.kv_heads}) > 1:
        yield f"{spec.num_kv_heads} KV heads as {_parts(shards.kv_heads)}"
    sizes: set[tuple[Dim, int]] = set()
    for tensor in spec.tensors():
        sizes.update(zip(tensor.dims, tensor.shape, strict=True))
    for dim, size in sorted(pair for pair in sizes if pair[0] in _DIM_NAMES):
        parts = [shards.range(dim, size, rank) for rank in range(tp)]
        if max(map(_length, parts)) > _NEARLY * min(map(_length, parts)):
            yield f"{size} {_DIM_NAMES[dim]} as {_parts(parts)}"


def _length(part: Range) -> int:
    return part[1] - part[0]


def _parts(parts: Sequence[Range]) -> str:
    """``6 + 3``, ``3 × 2 + 1``."""
    runs = [(length, len(list(run))) for length, run in groupby(map(_length, parts))]
    if len(runs) > 4:
        return f"{_span(map(_length, parts))} each"
    return " + ".join(str(length) if count == 1 else f"{count} × {length}" for length, count in runs)


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
