"""`POST /v1/completions`."""

from collections.abc import Sequence

from pydantic import Field

from .base import SamplingFields, StreamOptions


class CompletionRequest(SamplingFields):
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = None
