"""What becomes of one request's logits before a token is drawn from them: plain numbers, no torch."""

from dataclasses import dataclass

from ..config.logits_processors import LogitsProcessor


@dataclass(frozen=True)
class LogitsSpec:
    """Operations on the logits of a request's every token, in the order in which they are applied.

    "Before" a token are the prompt's tokens and then the output's. Hashable; picklable if its processors are.
    """

    num_prompt_tokens: int = 0  # of the tokens before, these are not output
    bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added), no id twice
    repetition_penalty: float = 1.0  # of tokens before: logits above 0 are divided by it, others multiplied
    presence_penalty: float = 0.0  # subtracted if the token is in the output
    frequency_penalty: float = 0.0  # subtracted as often as the token is in the output
    no_repeat_ngram_size: int = 0  # 0: off; a token that would complete an n-gram that came before is banned
    bad_words: tuple[tuple[int, ...], ...] = ()  # none is empty; the last id is banned after all of the others
    min_tokens: int = 0  # end_ids are banned until so many output tokens are there
    end_ids: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None  # all other ids are banned; None: off
    suppressed: tuple[int, ...] = ()  # banned
    begin_suppressed: tuple[int, ...] = ()  # banned as the first output token
    processors: tuple[LogitsProcessor, ...] = ()

    @property
    def is_neutral(self) -> bool:
        """Whether it changes no logit of any token."""
        return not self.needs_history and not (
            self.bias
            or self.bad_words
            or (self.min_tokens and self.end_ids)
            or self.allowed is not None
            or self.suppressed
            or self.begin_suppressed
        )

    @property
    def needs_history(self) -> bool:
        """Whether it depends on which tokens come before; how many there are is known without them."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or any(len(word) > 1 for word in self.bad_words)
            or self.processors
        )
