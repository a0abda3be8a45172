"""What requests may ask of their logits, as ops on one shard of the vocabulary: in place, on all rows at once.

`flat` is the logits, float32 [num_rows * local_vocab]; a token's place in it is ``row * local_vocab + token id -
start``. No result depends on the order in which a device handles elements, nor on other rows or shards: all are bitwise
the same in any batch, on any mesh, in any run. Nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = float("-inf")
_IN_PROMPT = 2.0**-24  # what a token of the prompt counts where one of the output counts 1: see `penalize`


@dataclass(frozen=True)
class Before:
    """The tokens before some rows, one row's after the other; num_tokens in all. `owners` count among these rows."""

    token_ids: Tensor  # [num_tokens] int64
    owners: Tensor  # [num_tokens] int64: the row that each is before
    indices: Tensor  # [num_tokens] int64: how many are before it in its row
    stops: Tensor  # [num_rows] int64: where each row's end
    places: Tensor  # [num_tokens] int64: in `flat`; for tokens of other shards some place in their row
    is_local: Tensor  # [num_tokens] bool: whether they are of this shard

    @classmethod
    def gather(
        cls, histories: Tensor, firsts: Tensor, lengths: Tensor, rows: Tensor, num_tokens: int, shard: tuple[int, int]
    ) -> "Before":
        """histories: int32, all slots flattened; firsts, lengths [num_rows]: each row's part of them; rows [num_rows]:
        their logits; shard: (start, stop) of the vocabulary."""
        owners = torch.repeat_interleave(lengths, output_size=num_tokens)
        stops = lengths.cumsum(0)
        indices = torch.arange(num_tokens, device=owners.device) - (stops - lengths).index_select(0, owners)
        token_ids = histories.index_select(0, firsts.index_select(0, owners) + indices).long()
        start, stop = shard
        local = token_ids - start
        clamped = local.clamp(0, stop - start - 1)
        places = (rows * (stop - start)).index_select(0, owners) + clamped
        return cls(token_ids, owners, indices, stops, places, local == clamped)


def add_bias(flat: Tensor, places: Tensor, bias: Tensor) -> None:
    """Adds bias, float32 [n], at places [n], none of which comes twice."""
    flat.scatter_add_(0, places, bias)


def penalize(
    flat: Tensor,
    before: Before,
    num_prompt_tokens: Tensor,
    repetition: Tensor,
    counted: tuple[Tensor, Tensor] | None,
) -> None:
    """Penalties on tokens that came before; each float32 [num_rows], num_prompt_tokens int64 [num_rows].

    repetition: logits of tokens before, prompt or output, are divided by it if above 0, else multiplied (Keskar et al.
    2019), as in transformers; 1: off. counted: frequency, which is then subtracted as often as a token is in the
    output, and presence, which is subtracted once, as in OpenAI's API; 0: off; None: off in all rows.
    """
    owners, places = before.owners, before.places
    old = flat.index_select(0, places)
    # The logits themselves are where tokens are counted: set to 0, then 1 is added for each of the output and 2^-24 for
    # each of the prompt. Rounded, the sum is the count of the output's, whatever the order; above 0, the token occurs.
    count = before.indices >= num_prompt_tokens.index_select(0, owners)
    weight = count.float().add_(_IN_PROMPT).mul_(before.is_local)
    flat.scatter_(0, places, torch.zeros_like(old))
    occurrences = flat.scatter_add_(0, places, weight).index_select(0, places)

    factor = repetition.index_select(0, owners)
    new = torch.where(old < 0, old * factor, old / factor)
    new = torch.where(occurrences > 0, new, old)
    if counted is not None:
        frequency, presence = counted
        counts = occurrences.round_()
        new -= frequency.index_select(0, owners) * counts
        new -= presence.index_select(0, owners) * counts.clamp_(max=1)
    flat.scatter_(0, places, new)  # one token's all write the same


def ban_repeated_ngrams(flat: Tensor, before: Before, sizes: Tensor, longest: int) -> None:
    """Bans tokens that would complete an n-gram which is among the tokens before (Paulus et al. 2017).

    sizes: int64 [num_rows], each row's n, 0: off; longest: the largest of them. As in transformers, of a row with fewer
    tokens none is banned.
    """
    size = sizes.index_select(0, before.owners)
    banned = (before.indices + 1 >= size) & (size > 0) & before.is_local
    for back in range(1, longest):  # the token so far before one is that which is so far before the next to be drawn
        latest = before.token_ids.index_select(0, (before.stops - back).clamp_(min=0))
        banned &= (before.token_ids.roll(back) == latest.index_select(0, before.owners)) | (size <= back)
    _ban_where(flat, before.places, banned)


def ban_completions(flat: Tensor, histories: Tensor, stops: Tensor, prefixes: Tensor, places: Tensor) -> None:
    """Bans places [n] where the tokens before are a prefix's.

    histories: int32, all slots flattened; stops: int64 [n], where a row's tokens end in them; prefixes: int64 [n,
    width], of tokens, on the right, and -1 before them; no row has fewer tokens than its prefix.
    """
    width = prefixes.shape[1]
    latest = stops.unsqueeze(1) - torch.arange(width, 0, -1, device=stops.device)
    token_ids = histories.index_select(0, latest.clamp_(min=0).view(-1)).view_as(prefixes)
    _ban_where(flat, places, ((token_ids == prefixes) | (prefixes < 0)).all(dim=1))


def ban(flat: Tensor, places: Tensor) -> None:
    flat.index_fill_(0, places, _NEVER)


def keep_only(logits: Tensor, rows: Tensor, places: Tensor) -> None:
    """Bans all tokens of rows [n] but those at places of the flattened logits."""
    flat = logits.view(-1)
    kept = flat.index_select(0, places)
    logits.index_fill_(0, rows, _NEVER)
    flat.scatter_(0, places, kept)


def _ban_where(flat: Tensor, places: Tensor, banned: Tensor) -> None:
    """Bans those of places [n] where banned [n] is true; a place may come several times, with either."""
    least = torch.full_like(places, -_NEVER, dtype=flat.dtype).masked_fill_(banned, _NEVER)
    flat.scatter_reduce_(0, places, least, "amin")
