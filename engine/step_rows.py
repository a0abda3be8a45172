"""Which rows of a step's logits are wanted, and what for: plain Python, no torch.

A row comes after a token of the step. Tokens are drawn from some (`SampleRequest`), others only tell how probable a
token is that is known already (`GivenRows`).
"""

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache

from .sequence import Sequence
from .step import GivenRows, HistoryUpdate, Masks, PooledRows, SampleRequest, SampleSettings, StepInput, drawn_before


@dataclass(frozen=True)
class ScheduledStep:
    """A step, and whose it is."""

    input: StepInput
    sequences: tuple[Sequence, ...]  # in the step's order
    drafts: tuple[tuple[int, ...], ...]  # of each of these, the tokens that were guessed
    draws: tuple[tuple[Sequence, tuple[int, ...]], ...]  # who draws a sample, and one more after each draft
    given: tuple[Sequence, ...] = ()  # whose `StepInput.given` are
    pooled: tuple[Sequence, ...] = ()


class StepRows:
    """Collects the rows of a step, sequence by sequence."""

    def __init__(self) -> None:
        self.samples: list[SampleRequest] = []
        self.draws: list[tuple[Sequence, tuple[int, ...]]] = []
        self.drawing: dict[Sequence, int] = {}  # sequence -> its sample, the first of several
        self.histories: list[HistoryUpdate] = []
        self.given: list[GivenRows] = []
        self.scored: list[Sequence] = []  # whose these are
        self.pooled: list[PooledRows] = []
        self.in_pool: list[Sequence] = []
        self._masked: list[int] = []
        self._masks: list[bytes] = []

    @property
    def masks(self) -> Masks | None:
        return Masks(tuple(self._masked), b"".join(self._masks)) if self._masked else None

    def add_draws(self, sequence: Sequence, row: int, drawn: Mapping[Sequence, int]) -> None:
        """A token after `row`, and one after each of the drafts that follow it. drawn: `drawing` of the step
        that it is ahead of."""
        drafts = sequence.drafts
        position = max(sequence.num_tokens, sequence.num_scheduled_tokens - len(drafts))  # of the first
        if sequence.constraint is not None:
            self._mask(sequence)
        if sequence.slot is not None:
            self._tell(sequence, drafts, drawn if position > sequence.num_tokens else None)
        self.drawing[sequence] = len(self.samples)
        self.draws.append((sequence, drafts))
        self.samples += [_sample_request(sequence, row + i, position + i) for i in range(1 + len(drafts))]
        sequence.num_draws_in_flight += 1

    def add_guess(self, sequence: Sequence, row: int) -> None:
        """What the draft model takes for the token after `row`, the last of those known and of those drafted.

        It is drawn as the token itself will be, by the same rules and with the same noise. Users' processors are not
        asked what they make of a guess, and then no rule is heeded.
        """
        has_rules = sequence.slot is not None and sequence.logits is not None and not sequence.logits.processors
        if sequence.constraint is not None:
            masks, num_valid = sequence.constraint.masks(sequence.drafted)
            assert num_valid == len(sequence.drafted)
            self._masked.append(len(self.samples))
            self._masks.append(masks[-1].tobytes())
        if has_rules:
            self._tell(sequence, sequence.drafted, None)
        sample = _sample_request(sequence, row, sequence.num_tokens + len(sequence.drafted))
        slot = sample.settings.slot if has_rules else -1
        self.samples.append(sample._replace(settings=sample.settings._replace(slot=slot, logprobs=None)))
        self.draws.append((sequence, ()))

    def _mask(self, sequence: Sequence) -> None:
        assert sequence.constraint is not None
        masks, num_valid = sequence.constraint.masks(sequence.drafts)
        assert num_valid == len(sequence.drafts)
        self._masked += range(len(self.samples), len(self.samples) + 1 + num_valid)
        self._masks.append(masks.tobytes())

    def _tell(self, sequence: Sequence, drafts: Seq[int], drawn: Mapping[Sequence, int] | None) -> None:
        """Brings what the ranks keep of a sequence up to its last draft; of `drawn`, in between, up to its sample."""
        assert sequence.slot is not None and sequence.logits is not None
        is_new = sequence.num_told_tokens < 0
        keep, tokens = min(max(0, sequence.num_told_tokens), sequence.num_tokens + len(drafts)), array("q")
        if sequence.logits.needs_history:
            tokens.extend(sequence.token_ids[keep:])
            if drawn is not None:
                tokens.append(drawn_before(drawn[sequence]))
            tokens.extend(drafts[max(0, keep - sequence.num_tokens) :])
        if is_new or tokens:
            spec = sequence.logits if is_new else None
            self.histories.append(HistoryUpdate(sequence.slot, keep, tokens, spec))
        sequence.num_told_tokens = keep + len(tokens)

    def add_given(self, sequence: Sequence, first: int, count: int) -> None:
        """What is asked of the prompt and was not before, the step having `count` of the sequence's tokens from its
        `first` on."""
        if sequence.prompt_logprobs is None and not sequence.is_pooled:
            return
        start = sequence.num_scheduled_tokens - count
        num_askable = sequence.num_prompt_tokens - (0 if sequence.is_pooled else 1)
        begin, stop = max(start, sequence.num_asked), min(start + count, num_askable)
        if begin >= stop:
            return
        row = first + begin - start
        if sequence.prompt_logprobs is not None:
            targets = array("q", sequence.token_ids[begin + 1 : stop + 1])
            self.given.append(GivenRows(row, targets, sequence.prompt_logprobs))
            self.scored.append(sequence)
        if sequence.is_pooled:
            self.pooled.append(PooledRows(row, row + stop - begin))
            self.in_pool.append(sequence)
        sequence.num_asked = stop


def _sample_request(sequence: Sequence, row: int, position: int) -> SampleRequest:
    num_output, slot = position - sequence.num_prompt_tokens, -1 if sequence.slot is None else sequence.slot
    forced = sequence.forced[num_output] if num_output < len(sequence.forced) else -1
    settings = sequence.settings
    if settings is None or settings.slot != slot or settings.forced != forced:
        settings = sequence.settings = _settings_of(sequence, slot, forced)
    return SampleRequest(row, position, settings)


def _settings_of(sequence: Sequence, slot: int, forced: int) -> SampleSettings:
    sample = sequence.sample
    seed = sample.seed if sample.temperature else 0
    filters = sample.top_k, sample.top_p, sample.min_p
    return _shared(seed, sample.temperature, *filters, slot, forced, sequence.logprobs, sequence.num_candidates)


_shared = lru_cache(maxsize=1024)(SampleSettings)  # a message to a rank has what is the same once
