"""Log-probabilities of tokens, exact over vocabulary shards: of the one asked for, with its rank, and of the likeliest.

Each rank reduces its logits in chunks of 128. The largest of each chunk says which chunks the likeliest tokens are in,
and sums over chunks are the same whether a row is alone or in a batch. Ranks exchange a few numbers a row, twice.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..mesh.collectives import Communicator
from ..shardformer.shard import Range

_CHUNK = 128  # logits
_LOGITS_AT_ONCE = 1 << 22  # what is computed of them takes 16 MiB
_HIDDEN_AT_ONCE = 64  # rows of which logits are computed together: 32 MiB of a vocabulary of 128k
_LOWEST = torch.finfo(torch.float32).min
_LOG2_E = math.log2(math.e)
_NO_KEY = torch.iinfo(torch.int64).min
_LAST_ID = (1 << 32) - 1


class Logprobs:
    """Over one vocabulary shard, with the other ranks of `tp`. vocabulary: each rank's (start, stop).

    Nothing waits for the device.
    """

    def __init__(self, tp: Communicator, vocabulary: Sequence[Range]) -> None:
        self.tp = tp
        self.start, self.stop = vocabulary[tp.rank]
        self.vocab_size = vocabulary[-1][1]

    def __call__(self, logits: Tensor, targets: Tensor, top: int) -> Tensor:
        """float64 [num_rows, 2 + 2 * top], the same on every rank; `top` beyond the vocabulary's size is that size.

        logits: float32 [num_rows, local_vocab], which stay as they are; targets: int64 [num_rows], token ids.

            | log-probability of the target | its rank, from 1 | ids of the likeliest | their log-probabilities |

        Rank: how many tokens are likelier, and one. The likeliest come in order, of equals the lowest id first.
        """
        top = min(top, self.vocab_size)
        maxima, normaliser = _reduce(logits)
        local = (targets - self.start).unsqueeze(1)
        clamped = local.clamp(0, self.stop - self.start - 1)
        target = logits.gather(1, clamped).masked_fill_(local != clamped, float("-inf"))
        numbers = torch.cat((normaliser, target), dim=1).view(torch.int64)  # of which the keys need all 64 bits
        gathered = self.tp.all_gather(torch.cat((numbers, self._top_keys(logits, maxima, top)), dim=1))

        numbers = gathered[:, :, :2].contiguous().view(torch.float64)  # [tp, num_rows, 2]
        normaliser, target = numbers[:, :, :1].logsumexp(dim=0), numbers[:, :, 1:].amax(dim=0)  # [num_rows, 1]
        above = self.tp.all_gather(_count_above(logits, target.float())).sum(dim=0)
        values, token_ids = _unpack(gathered[:, :, 2:].transpose(0, 1).flatten(1).topk(top, dim=1).values)
        return torch.cat((target - normaliser, 1 + above, token_ids, values - normaliser), dim=1)

    def of_hidden(self, hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, top: int) -> Tensor:
        """The same of hidden states [num_rows, hidden], of which `head` makes logits: not of all at once."""
        parts = zip(hidden.split(_HIDDEN_AT_ONCE), targets.split(_HIDDEN_AT_ONCE), strict=True)
        return torch.cat([self(head(rows).float(), of_rows, top) for rows, of_rows in parts])

    def normalised(self, logits: Tensor) -> Tensor:
        """Log-probabilities of all of the shard's tokens, float32 as logits [num_rows, local_vocab]."""
        _, normaliser = _reduce(logits)
        return logits - self.tp.all_gather(normaliser).logsumexp(dim=0).float()

    def likeliest(self, scores: Tensor, top: int) -> Tensor:
        """float64 [num_rows, 2 * top]: ids of the tokens with the highest scores, of equals the lowest first, and these
        scores. scores: float32 [num_rows, local_vocab]."""
        maxima, _ = _reduce(scores)
        keys = self.tp.all_gather(self._top_keys(scores, maxima, min(top, self.vocab_size)))
        values, token_ids = _unpack(keys.transpose(0, 1).flatten(1).topk(min(top, self.vocab_size), dim=1).values)
        return torch.cat((token_ids, values), dim=1).double()

    def _top_keys(self, logits: Tensor, maxima: Tensor, top: int) -> Tensor:
        """Keys of the shard's likeliest, descending [num_rows, top]; the lowest key where there are too few.

        A token is among them only if its chunk is among as many chunks with the largest maxima, the first of equals.
        """
        local_vocab = logits.shape[1]
        if top == 0:
            return maxima.new_empty(len(maxima), 0, dtype=torch.int64)
        numbers = torch.arange(maxima.shape[1], device=logits.device)
        _, chunks = _unpack(_keys(maxima, numbers).topk(min(top, len(numbers)), dim=1).values)
        local = (chunks.unsqueeze(2) * _CHUNK + torch.arange(_CHUNK, device=logits.device)).flatten(1)
        candidates = _keys(logits.gather(1, local.clamp(max=local_vocab - 1)), local + self.start)
        candidates.masked_fill_(local >= local_vocab, _NO_KEY)  # behind the end of the last chunk
        keys = candidates.topk(min(top, local_vocab), dim=1).values
        return torch.nn.functional.pad(keys, (0, top - keys.shape[1]), value=_NO_KEY)


def _reduce(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of chunks, float32 [num_rows, num_chunks], and the log of the sum of exp, float64 [num_rows, 1]."""
    maxima = torch.cat([_by_chunk(x, lambda chunk: chunk.amax(dim=-1)) for x in _blocks(logits)])
    largest = maxima.amax(dim=1, keepdim=True).clamp_(min=_LOWEST)  # not -inf, of which no difference can be made
    sums = [
        # exp2 takes a third of the time of exp on a CPU, and as the likeliest are near 0 here, scaling costs no digit.
        _by_chunk((x - top).mul_(_LOG2_E).exp2_(), lambda chunk: chunk.sum(dim=-1))
        for x, top in zip(_blocks(logits), _blocks(largest, logits.shape[1]), strict=True)
    ]
    return maxima, torch.cat(sums).double().sum(dim=1, keepdim=True).log_() + largest


def _count_above(logits: Tensor, threshold: Tensor) -> Tensor:
    """How many logits of each row are above its threshold, int64 [num_rows, 1]; threshold: [num_rows, 1]."""
    counts = [
        # As float32, which is summed faster than bool; exact below 2^24.
        _by_chunk(torch.gt(x, least, out=torch.empty_like(x)), lambda chunk: chunk.sum(dim=-1))
        for x, least in zip(_blocks(logits), _blocks(threshold, logits.shape[1]), strict=True)
    ]
    return torch.cat(counts).sum(dim=1, keepdim=True).long()


def _blocks(x: Tensor, row_size: int | None = None) -> tuple[Tensor, ...]:
    """Some rows at a time, so many as `_LOGITS_AT_ONCE` allows if a row has so many logits."""
    return x.split(max(1, _LOGITS_AT_ONCE // (row_size or x.shape[1])))


def _by_chunk(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[num_rows, n] to [num_rows, n / 128], rounded up. `reduce` takes the last dim away."""
    num_whole = x.shape[1] // _CHUNK
    whole, rest = x[:, : num_whole * _CHUNK], x[:, num_whole * _CHUNK :]
    parts = [reduce(whole.view(len(x), num_whole, _CHUNK))] if num_whole else []
    parts += [reduce(rest).unsqueeze(1)] if rest.shape[1] else []
    return torch.cat(parts, dim=1)


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 numbers in the order of float32 values, and of equals the lowest id, below 2^32, the largest."""
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    return (_ordered(bits).long() << 32) | (_LAST_ID - ids)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Values, float32, and ids, int64."""
    return _ordered((keys >> 32).int()).view(torch.float32), _LAST_ID - (keys & _LAST_ID)


def _ordered(bits: Tensor) -> Tensor:
    """The bits of float32 as int32 that are ordered as the floats are; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
