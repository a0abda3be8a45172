"""What crosses from the driver to a replica's ranks and back: frozen, plain numbers."""

from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from .logits_spec import LogitsSpec

MAX_DRAFTS = 256  # tokens of a step, guessed or forced, that have rows of logits beside one for each sequence


class SampleSettings(NamedTuple):
    """How a sequence's next token is drawn: mostly as the one before, and then the very same object."""

    seed: int  # of its noise
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    slot: int = -1  # of what its logits depend on beside the model (`HistoryUpdate`); -1: nothing
    forced: int = -1  # the token that is given instead of drawn
    logprobs: int | None = None  # how many of the likeliest tokens are told with their log-probabilities; -1: all
    num_candidates: int = 0  # of a beam: so many of its best continuations are told


class SampleRequest(NamedTuple):  # made for each token: a dataclass takes four times as long
    """One row of logits, and how a token is drawn from it.

    A sequence has several in a step whose tokens go on with some that were guessed, one after each, or whose prompt
    has several continuations: each is drawn as if it were alone.
    """

    row: int  # index in the step's token_ids: the token after which it comes
    position: int  # of the drawn token: how many come before it
    settings: SampleSettings


@dataclass(frozen=True)
class HistoryUpdate:
    """What the last stage's ranks keep of a sequence from step to step: what shapes its logits, and its tokens."""

    slot: int
    keep: int  # tokens that stay
    tokens: "array[int]"  # int64: those that come after them; below 0: see `drawn_before`
    spec: LogitsSpec | None  # of a sequence that is new in the slot


@dataclass(frozen=True)
class GivenRows:
    """Consecutive rows of a prompt whose next tokens are known, and of which log-probabilities are asked."""

    row: int  # index in the step's token_ids
    targets: "array[int]"  # int64: the token after each
    logprobs: int  # as in SampleRequest


@dataclass(frozen=True)
class PooledRows:
    """Consecutive tokens whose last hidden states are asked for: their sum, float32 [hidden]."""

    row: int
    stop: int


@dataclass(frozen=True)
class StepInput:
    """One forward of one replica: new tokens of some sequences, flattened, never padded."""

    step_id: int
    token_ids: "array[int]"  # int64 [num_tokens]; below 0: see `drawn_before`
    query_lens: tuple[int, ...]  # new tokens of each sequence, >= 1
    context_lens: tuple[int, ...]  # its tokens before those, in the cache already
    block_tables: tuple["array[int]", ...]  # int32: its blocks, enough for context and new tokens
    samples: tuple[SampleRequest, ...]  # in the order in which the output's ids come
    copies: tuple[tuple[int, int], ...] = ()  # (from, to): blocks that are copied before all else
    histories: tuple[HistoryUpdate, ...] = ()
    masks: "Masks | None" = None
    given: tuple[GivenRows, ...] = ()
    pooled: tuple[PooledRows, ...] = ()
    model: int = 0  # 0: the target; 1: the draft model
    ahead_of: int = 0  # the step whose draws stand below 0; 0: none

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @cached_property
    def draws_after_all(self) -> bool:
        """Whether a token is drawn after each of its tokens, in their order."""
        samples = self.samples
        return len(samples) == self.num_tokens and all(sample.row == row for row, sample in enumerate(samples))

    def __reduce__(self) -> tuple[Any, ...]:
        """As a message: what it has of each sequence is put together, which takes a third of the time."""
        fields = {**self.__dict__}
        token_ids, tables, samples = (fields.pop(name) for name in ("token_ids", "block_tables", "samples"))
        rows, positions, settings = zip(*samples, strict=True) if samples else ((), (), ())
        widths = tuple(map(len, tables))
        return _step_of, (fields, token_ids.tobytes(), b"".join(tables), widths, rows, positions, settings)

    @property
    def wants_samples_alone(self) -> bool:
        """Whether the last stage is to give hidden states only where a token is drawn, and that is not everywhere."""
        return 0 < len(self.samples) < self.num_tokens and not self.given and not self.pooled


def _step_of(
    fields: dict[str, Any],
    token_ids: bytes,
    tables: bytes,
    widths: tuple[int, ...],
    rows: tuple[int, ...],
    positions: tuple[int, ...],
    settings: tuple[SampleSettings, ...],
) -> StepInput:
    """What `StepInput.__reduce__` took apart."""
    blocks, step = array("i", tables), object.__new__(StepInput)
    step.__dict__.update(
        fields,
        token_ids=array("q", token_ids),
        block_tables=tuple([blocks[start:stop] for start, stop in pairwise(accumulate(widths, initial=0))]),
        samples=tuple(map(SampleRequest, rows, positions, settings)),
    )
    return step


@dataclass(frozen=True)
class Masks:
    """Which tokens a grammar allows: a bit each, [len(samples), ceil(vocab / 32)] int32, for some of the samples."""

    samples: tuple[int, ...]
    words: bytes


def drawn_before(sample: Any) -> Any:
    """Stands in `token_ids` for what step `ahead_of` draws for its `sample`-th sample; its own inverse."""
    return -1 - sample


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a token and of the likeliest ones in its place, of the model's own distribution."""

    logprob: float
    rank: int  # 1: the likeliest
    top_ids: tuple[int, ...]  # descending
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class StepOutput:
    """What the last stage drew, one id for each of the step's samples; and what else was asked for."""

    step_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] | None = None  # one for each sample, where any asked
    given: tuple[tuple[TokenLogprobs, ...], ...] = ()  # of `StepInput.given`
    pooled: tuple[bytes, ...] = ()  # float32 [hidden], of `StepInput.pooled`
    errors: tuple[tuple[int, str], ...] = ()  # samples whose logits processors failed, and why
