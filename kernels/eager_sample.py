"""Every op of the sampler in plain torch: the definition that tests compare against and the eager path runs."""

from collections.abc import Callable

import torch
from torch import Tensor

_NEVER = float("-inf")


def counter_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise that depends on (key, token id) alone, so that every shard of a vocabulary draws its own part.

    keys: [num_rows, 2] int32, two independent words for each request and position; token_ids: int32 [n] or
    [num_rows, n]. Returns float32 [num_rows, n]: ``argmax(logits + noise)`` is a draw from ``softmax(logits)``
    (Gumbel-max). Each word goes through the 32-bit mixer "lowbias32" (Wellons, hash-prospector).
    """
    bits = token_ids * -1640531527 + keys[:, :1]  # 2^32 / golden ratio as int32; products wrap
    bits = _mix32(bits)
    bits = _mix32(bits.bitwise_xor_(keys[:, 1:]))
    # Small values keep all of the 31 bits, and they make the largest noise: up to 22, ties being rare.
    uniform = ((bits >> 1) & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    exponential = -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))
    return -exponential.log_()


def sample_shard(logits: Tensor, temperatures: Tensor, keys: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The best token of a vocabulary shard for each row, by ``logits / temperature + noise`` (`counter_noise`).

    logits: [num_rows, local_vocab], of tokens from `start` on; temperatures: float32 [num_rows], 0 for the plain
    argmax; keys: int32 [num_rows, 2]. Returns the best score, float32 [num_rows], and its token id, int64 [num_rows]:
    the lowest of equals; NaN counts as the largest. The best of all shards is the row's draw.
    """
    drawn, logits = temperatures.nonzero().squeeze(1), logits.float()
    if len(drawn):
        token_ids = torch.arange(start, start + logits.shape[1], dtype=torch.int32, device=logits.device)
        scores = logits[drawn].div_(temperatures[drawn].unsqueeze(1)).add_(counter_noise(keys[drawn], token_ids))
        logits = logits.index_copy(0, drawn, scores)
    best = logits.max(dim=-1)
    return best.values, best.indices + start


def likeliest(logits: Tensor, temperatures: Tensor, count: int, with_mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest of each row's logits over its temperature, descending, and where they are; and two limits.

    logits: [num_rows, n], contiguous, count <= n; temperatures: float32 [num_rows], above 0. Returns float32
    and int64 [num_rows, count], of equals any (where a logit is -inf, its place says nothing), and float64
    [num_rows, 2]: the log-sum-exp over the row, 0 unless `with_mass`, and a value below which some are missing, -inf
    if none are.
    """
    scaled = logits / temperatures.unsqueeze(1)  # in float32, by the temperatures'
    values, places = scaled.topk(count, dim=-1)
    limits = torch.zeros(len(logits), 2, dtype=torch.float64, device=logits.device)
    if with_mass:
        limits[:, 0] = scaled.logsumexp(dim=-1)
    limits[:, 1] = values[:, -1] if count < logits.shape[1] else _NEVER
    return values, places, limits


def draw_filtered(
    values: Tensor,
    token_ids: Tensor,
    limits: Tensor,
    filters: Tensor,
    keys: Tensor,
    noise: Callable[[Tensor, Tensor], Tensor] = counter_noise,
) -> Tensor:
    """A token of each row, drawn among the likeliest that top-k, top-p over what top-k left, and min-p keep.

    values: float32 [num_rows, n], logits over temperature, descending; token_ids: int64 [num_rows, n]; limits: float64
    [num_rows, 2], log-sum-exp over the whole vocabulary, which a row with top-k does not need, and a value below which
    tokens may be missing; filters: float64 [3, num_rows], top-k (inf: off), top-p, min-p; keys: int32 [num_rows, 2], of
    the noise. Returns int64 [2, num_rows]: token ids, and 1 where every token that is kept is among those given.
    """
    scores, values = values, values.double()
    top_k, top_p, min_p = filters.unsqueeze(2)
    mass, floor = limits[:, :1], limits[:, 1:]
    place = torch.arange(values.shape[1], device=values.device, dtype=torch.float64)
    kth = values.gather(1, (top_k.clamp(max=values.shape[1]) - 1).long())
    keep = (place < top_k) | (values >= kth)  # equals of the k-th stay, as in transformers
    nothing_missing = floor == _NEVER
    all_of_top_k = top_k.isinf() | nothing_missing | (kth > floor)
    kept_mass = torch.where(top_k.isinf(), mass, values.masked_fill(~keep, _NEVER).logsumexp(dim=-1, keepdim=True))

    probability = (values - kept_mass).exp().masked_fill(~keep, 0)
    before = probability.cumsum(dim=-1) - probability  # of the likelier ones
    keep &= (before < top_p) | (place == 0) | (top_p >= 1)
    keep &= values >= values[:, :1] + min_p.log()
    keep &= values > _NEVER

    lowest = values.masked_fill(~keep, float("inf")).amin(dim=-1, keepdim=True)
    complete = (nothing_missing | (lowest > floor)) & all_of_top_k  # or nothing that would be kept
    scores = scores + noise(keys, token_ids.int())
    winner = scores.masked_fill_(~keep, _NEVER).argmax(dim=-1, keepdim=True)
    return torch.stack((token_ids.gather(1, winner).squeeze(1), complete.squeeze(1).long()))


def apply_bitmask(logits: Tensor, rows: Tensor | None, mask: Tensor, start: int) -> None:
    """Sets the logits of tokens whose bit is not set to -inf, in place.

    logits: float32 [num_rows, local_vocab], of tokens from `start` on; rows: int64 [n], those that have a mask, None:
    all of them; mask: int32 [n, ceil(vocab / 32)], contiguous, bit ``i % 32`` of word ``i // 32`` for token i.
    """
    first, count = start % 32, logits.shape[1]
    words = mask[:, start // 32 : (start + count + 31) // 32]
    bits = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=mask.device) & 1
    banned = bits.flatten(1)[:, first : first + count] == 0
    if rows is None:
        logits.masked_fill_(banned, float("-inf"))
    else:
        logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(banned, float("-inf")))


def _mix32(bits: Tensor) -> Tensor:
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits *= 0x7FEB352D
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= 0x846CA68B - (1 << 32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits
