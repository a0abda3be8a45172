"""Every op in plain torch: the definition that tests compare against and the eager path runs.

Shapes use ``num_tokens`` for tokens flattened over the batch; nothing is padded unless a comment says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------
# norms


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``weight * x / sqrt(mean(x²) + eps)``, the mean in float32 (Zhang & Sennrich 2019), rounded as in transformers.

    x: [..., hidden]; weight: [hidden]. `offset` is added to the weight, and the product is then in float32 (Gemma's
    ``1 + weight``). Returns x's shape and dtype.
    """
    wide = x.float()
    scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    if offset:
        return (wide * scale).mul_(weight.float() + offset).to(x.dtype)
    return (wide * scale).to(x.dtype).mul_(weight)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum: ``(rms_norm(x + residual), x + residual)``.

    x, residual: [num_tokens, hidden]; ``residual=None`` means that the stream starts with x.
    """
    total = x if residual is None else x + residual
    return rms_norm(total, weight, eps, offset), total


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Adds x to the residual stream and normalises the sum: ``(layer_norm(x + residual), x + residual)``.

    layer_norm(x) is ``weight * (x - mean(x)) / sqrt(var(x) + eps) + bias``, var being the mean of squares about the
    mean, in float32 inside (Ba et al. 2016). x, residual: [..., hidden]; ``residual=None`` means that the stream starts
    with x, which is then the sum itself; weight, bias: [hidden], None: without (OLMo has neither).
    """
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def head_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Layer norm of each head with a weight of its own and no bias (Cohere), in float32 inside.

    x: [num_tokens, heads, head_dim], a view of a wider product as a rule; weight: [heads, head_dim]. Contiguous.
    """
    wide = x.float()
    centred = wide - wide.mean(dim=-1, keepdim=True)
    scale = centred.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
    return centred.mul_(scale).mul_(weight.float()).to(x.dtype, memory_format=torch.contiguous_format)


# --------------------------------------------------------------------------------------------------------------
# activations


ACTIVATIONS = {  # the kinds, by the names that transformers' configs give them
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}

KINDS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "swiglu_oai")  # the last is always gated

Activation = Callable[[Tensor], Tensor]


def activation_kind(name: str) -> str:
    """The kind that a config's name stands for; a kind's own name, and one that is not known, stand for themselves."""
    return ACTIVATIONS.get(name, name)


def _quick_gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return torch.sigmoid(1.702 * wide).mul_(wide).to(x.dtype)


_ACTIVATED: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
}


def activation(kind: str) -> Activation:
    """The function of that kind, x [num_tokens, n] -> a new tensor of x's shape; in float32 inside, rounded once.

    silu         ``x * sigmoid(x)``
    gelu         ``x * Phi(x)``, Phi from erf (Hendrycks & Gimpel 2016)
    gelu_tanh    ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x³)))``
    quick_gelu   ``x * sigmoid(1.702 x)``
    relu, relu2  ``max(x, 0)`` and its square (So et al. 2021)
    """
    return _ACTIVATED[kind]


def gated_activation(kind: str) -> Activation:
    """``activation(gate) * up`` (Shazeer 2020), the activation rounded before the product: gate_up -> [num_tokens, n].

    gate_up: [num_tokens, 2 * n], gate first. One more kind, `swiglu_oai` (GPT-OSS), has gate and up in turns, and is
    ``(up + 1) * gate * sigmoid(1.702 * gate)`` with gate at most 7 and up within ±7, rounded once.
    """
    if kind == "swiglu_oai":
        return _swiglu_oai
    activated = _ACTIVATED[kind]

    def gated(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return activated(gate).mul_(up)

    return gated


def _swiglu_oai(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].float().clamp(max=7.0), gate_up[..., 1::2].float().clamp(-7.0, 7.0)
    return (torch.sigmoid(1.702 * gate).mul_(gate) * (up + 1)).to(gate_up.dtype)


# --------------------------------------------------------------------------------------------------------------
# rotary embedding, KV store


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of the first ``2 * width`` elements of each head; the rest is kept.

    x: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, width], each token's own, width <= head_dim / 2. The pairs
    are (i, i + width), NeoX's halves, or (2i, 2i + 1), GPT-J's neighbours, if `interleaved`.
    """
    width = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * width, 2), slice(1, 2 * width, 2)
    else:
        first, second = slice(0, width), slice(width, 2 * width)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., first], cos, out=out[..., first]).addcmul_(x[..., second], sin, value=-1)
    torch.mul(x[..., second], cos, out=out[..., second]).addcmul_(x[..., first], sin)
    if 2 * width < x.shape[-1]:
        out[..., 2 * width :] = x[..., 2 * width :]
    return out


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes each token's key and value into its slot of the paged cache, NaN and infinities as zeros.

    (Attention masks a slot that is not its sequence's by a weight of 0, which only a finite value survives: one
    request's overflow must not reach another that gets its block later, or is padded with it.)

    key: [num_tokens, kv_heads, head_dim], value: [num_tokens, kv_heads, value_dim]; caches: [num_blocks, block_size,
    kv_heads, head_dim or value_dim]; slots: [num_tokens] int64, ``block * block_size + offset``; a row whose slot is -1
    is padding and not stored.
    """
    store(key, key_cache, slots)
    store(value, value_cache, slots)


def store(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    """`store_kv` of the keys, or of the values, alone."""
    cache_slots = cache.flatten(0, 1)
    if not slots.is_cpu:
        x, slots = _repeat_over_padding(x, cache_slots, slots)
    elif slots.numel() and int(slots.min()) < 0:
        x, slots = x[slots >= 0], slots[slots >= 0]
    cache_slots.index_copy_(0, slots, x.nan_to_num(0.0, 0.0, 0.0))


def _repeat_over_padding(x: Tensor, cache_slots: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Makes each row of padding store what another row stores, so that the host need not wait to know how many are.

    Where all rows are padding, each stores what slot 0 holds.
    """
    if not slots.numel():
        return x, slots
    stored = slots >= 0
    rows = torch.arange(len(slots), device=slots.device)
    rows = torch.where(stored, rows, stored.int().argmax())
    nothing = (slots[rows] < 0).view(-1, 1, 1)
    return torch.where(nothing, cache_slots[:1], x[rows]), slots[rows].clamp(min=0)


def rotary_store_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotates a step's queries and keys and stores its keys and values: `rotary` of both, then `store_kv`.

    query: [num_tokens, heads, head_dim], key: [num_tokens, kv_heads, head_dim], value: [num_tokens, kv_heads,
    value_dim], views of one product as a rule; no value where it is in the key (`values_in_keys`); cos, sin:
    [max_positions, width], width <= head_dim / 2; positions: [num_tokens] int64. Returns the rotated query, contiguous.
    """
    cos, sin = cos[positions], sin[positions]
    store(rotary(key, cos, sin, interleaved), key_cache, slots)
    if value is not None:
        store(value, value_cache, slots)
    return rotary(query, cos, sin, interleaved)


# --------------------------------------------------------------------------------------------------------------
# vocabulary shards


def embedding(token_ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """Rows of a vocabulary shard; a token outside ``[start, start + len(weight))`` gives a row of zeros.

    token_ids: [num_tokens] int64; weight: [local_vocab, hidden]. Summed over the shards this is the whole look-up.
    """
    local = token_ids - start
    outside = (local < 0) | (local >= weight.shape[0])
    rows = F.embedding(local.masked_fill(outside, 0), weight)
    return rows.masked_fill_(outside.unsqueeze(-1), 0)


# --------------------------------------------------------------------------------------------------------------
# paged attention


@dataclass(frozen=True, eq=False)
class AttentionFeatures:
    """What some models add to causal attention, the scores being ``scale * query @ key``; None: not this one."""

    window: int | None = None  # the query at position p sees keys p - window + 1 .. p (Beltagy et al. 2020)
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap) (Gemma 2)
    sinks: Tensor | None = None  # [heads]: a logit more in each softmax, with no value (GPT-OSS)
    alibi_slopes: Tensor | None = None  # [heads]: scores += slope * (key's position - query's) (Press et al. 2022)


PLAIN = AttentionFeatures()


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of one step that attention handles in one call."""

    start: int  # their queries' rows, in the plan's order
    stop: int
    blocks: Tensor  # [num_seqs * num_blocks] int64: block ids, short sequences padded with block 0
    num_seqs: int
    query_len: int  # the same for all sequences of the group
    key_lens: list[int]  # of each sequence
    key_len: int  # the longest sequence's keys
    mask: Tensor | None  # additive, broadcasts to [num_seqs, heads, query_len, key_len]; None where nothing is masked
    causal: bool  # a whole prompt: the mask is the square lower triangle and needs no tensor


@dataclass(frozen=True)
class AttentionPlan:
    """A step's groups, and the order of tokens in which each group's are neighbours; made once, used by every layer."""

    groups: list[AttentionGroup]
    order: Tensor | None  # [num_tokens] int64: row of the step that comes at each place; None if it is the step's own
    inverse: Tensor | None  # [num_tokens] int64: the way back


def plan_attention(
    query_lens: Sequence[int],
    key_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> AttentionPlan:
    """Cuts a step into groups: each chunk or prompt alone, decodes together with others of about their length.

    query_lens: new tokens of each sequence; key_lens: its keys, the new ones included; block_tables: its blocks;
    window: that of the layers which use this plan.
    """
    batches = [[i] for i, n in enumerate(query_lens) if n > 1]
    # A group wastes the gap to its longest member; a group of its own costs a few calls, about 64 keys' worth.
    batch: list[int] = []
    for i in sorted((i for i, n in enumerate(query_lens) if n == 1), key=lambda i: key_lens[i]):
        if batch and (key_lens[i] - key_lens[batch[0]]) * len(batch) > max(64, key_lens[i]):
            batches.append(batch)
            batch = []
        batch.append(i)
    if batch:
        batches.append(batch)

    groups, start = [], 0
    for batch in batches:
        query_len, key_len = query_lens[batch[0]], max(key_lens[i] for i in batch)
        num_blocks = -(-key_len // block_size)
        blocks = [b for i in batch for b in _padded(block_tables[i], num_blocks)]
        windowed = window is not None and window < key_len
        causal = query_len > 1 and query_len == key_len and not windowed
        mask = None
        if not causal and (query_len > 1 or windowed or any(key_lens[i] != key_len for i in batch)):
            positions = _positions([key_lens[i] for i in batch], query_len)
            hidden = _hidden(torch.arange(key_len), positions, window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)
        stop = start + len(batch) * query_len
        groups.append(
            AttentionGroup(
                start=start,
                stop=stop,
                blocks=torch.tensor(blocks, device=device),
                num_seqs=len(batch),
                query_len=query_len,
                key_lens=[key_lens[i] for i in batch],
                key_len=key_len,
                mask=mask,
                causal=causal,
            )
        )
        start = stop

    firsts = [0, *accumulate(query_lens)]
    order = [row for batch in batches for i in batch for row in range(firsts[i], firsts[i + 1])]
    if order == list(range(start)):
        return AttentionPlan(groups, None, None)
    forth = torch.tensor(order, device=device)
    return AttentionPlan(groups, forth, forth.argsort())


def _padded(blocks: Sequence[int], length: int) -> list[int]:
    return [*blocks[:length], *[0] * (length - len(blocks))]


def _positions(key_lens: Sequence[int], query_len: int) -> Tensor:
    """Of the queries, [num_seqs, 1, query_len, 1]: query j of a sequence with n keys stands at n - query_len + j."""
    first = torch.tensor(key_lens).view(-1, 1, 1, 1) - query_len
    return first + torch.arange(query_len).view(1, 1, -1, 1)


def _hidden(keys: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Where a query does not see a key, [num_seqs, 1, query_len, key_len]. keys: their positions [key_len]."""
    hidden = keys > positions
    return hidden if window is None else hidden.logical_or_(keys <= positions - window)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    features: AttentionFeatures = PLAIN,
) -> Tensor:
    """Causal attention of a step's queries over the paged cache, which already holds the step's own keys.

    query: [num_tokens, heads, head_dim]; key_cache: [num_blocks, block_size, kv_heads, head_dim], heads being a
    multiple of kv_heads (query head h reads KV head ``h // (heads // kv_heads)``); value_cache: [num_blocks,
    block_size, kv_heads, value_dim], which may be the last elements of each head in key_cache (`values_in_keys`);
    plan: made with the features' window. Returns [num_tokens, heads, value_dim].
    """
    explicit = any(x is not None for x in (features.softcap, features.sinks, features.alibi_slopes))
    query = query.contiguous() if plan.order is None else query.index_select(0, plan.order)
    num_tokens, heads, _ = query.shape
    kv_heads, value_dim = value_cache.shape[2:]
    output = torch.empty(num_tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    # Keys then stand for the values, of which the last elements are taken: torch is at its best where both are alike.
    in_keys = values_in_keys(key_cache, value_cache)
    for group in plan.groups:

        def gathered(cache: Tensor, group: AttentionGroup = group) -> Tensor:
            """[num_seqs, kv_heads, key_len, head_dim or value_dim]"""
            rows = cache.index_select(0, group.blocks).view(group.num_seqs, -1, *cache.shape[2:])
            return rows[:, : group.key_len].transpose(1, 2)

        key = gathered(key_cache)
        value = key if in_keys else gathered(value_cache)
        q, out = query[group.start : group.stop], output[group.start : group.stop]
        if group.query_len == 1 and not explicit:
            # The query heads of a KV head stand where a prompt's queries would: no copy of the keys for each of them.
            q, out = (x.view(group.num_seqs, kv_heads, -1, x.shape[-1]) for x in (q, out))
            found = F.scaled_dot_product_attention(q, key, value, attn_mask=group.mask, scale=scale)
        else:
            q, out = (x.view(group.num_seqs, group.query_len, heads, -1).transpose(1, 2) for x in (q, out))
            if explicit:
                found = _explicit_attention(q, key, value, group, scale, features)
            else:
                found = F.scaled_dot_product_attention(
                    q, key, value, attn_mask=group.mask, is_causal=group.causal, scale=scale, enable_gqa=True
                )
        out.copy_(found[..., -value_dim:])
    return output if plan.inverse is None else output.index_select(0, plan.inverse)


def values_in_keys(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether a value is the last elements of its key, which alone is cached.

    one head of key_cache    | rotated | latent |       as in multi-head latent attention (DeepSeek-V2)
    one of value_cache                 | latent |
    """
    beside = (key_cache.shape[-1] - value_cache.shape[-1]) * key_cache.element_size()
    return value_cache.data_ptr() == key_cache.data_ptr() + beside and value_cache.stride() == key_cache.stride()


def _explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, group: AttentionGroup, scale: float, features: AttentionFeatures
) -> Tensor:
    """What scaled_dot_product_attention cannot do, in float32 and step by step.

    query: [num_seqs, heads, query_len, head_dim]; key: [num_seqs, kv_heads, key_len, head_dim]; value: the same, of
    value_dim elements.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    key, value = (x.float().repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = scale * (query.float() @ key.mT)  # [num_seqs, heads, query_len, key_len]
    if features.softcap is not None:
        scores = features.softcap * torch.tanh(scores / features.softcap)
    keys = torch.arange(group.key_len, device=query.device)
    positions = _positions(group.key_lens, group.query_len).to(query.device)
    if features.alibi_slopes is not None:
        scores = scores + features.alibi_slopes.float().view(-1, 1, 1) * (keys - positions)
    scores = scores.masked_fill(_hidden(keys, positions, features.window), float("-inf"))
    if features.sinks is not None:
        sinks = features.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1] @ value
    return scores.softmax(dim=-1) @ value
