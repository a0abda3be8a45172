"""`POST /v1/completions`."""

from collections.abc import Sequence

from pydantic import Field

from ..errors import unsupported
from .base import MAX_LOGPROBS, SamplingFields, one_or_many

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SamplingFields):
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = False
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return one_or_many(self.prompt)

    def check(self) -> None:
        """Raises ApiError for what is not done, or not together."""
        if self.suffix:
            raise unsupported("suffix", "is not supported by this model: it continues texts and fills no gaps")
        super().check()
