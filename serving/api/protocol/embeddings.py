"""`POST /v1/embeddings`."""

from collections.abc import Sequence
from typing import Literal

from .base import Body, one_or_many


class EmbeddingRequest(Body):
    input: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None
    user: str | None = None

    pooling: Literal["mean", "last", "first"] | None = "mean"  # ours: of a text's last hidden states
    normalize: bool | None = True  # ours: to length 1, as OpenAI's are

    @property
    def inputs(self) -> list[str | list[int]]:
        return one_or_many(self.input)
