"""Parts of answers that several endpoints give."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson
from starlette.responses import Response

from ...engine.output import RequestOutput
from .protocol.base import SamplingFields
from .sse import DONE, event


class JsonAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def usage_of(outputs: Sequence[RequestOutput | None], num_copies: int = 1) -> dict[str, Any]:
    """Of the engine's requests as they are; None: nothing has come of one yet.

    num_copies: so many consecutive ones are of one prompt, which counts once.
    """
    known = {index: output for index, output in enumerate(outputs) if output is not None}
    prompts = {index // num_copies: output for index, output in known.items()}.values()
    prompt = sum(output.num_prompt_tokens for output in prompts)
    completion = sum(len(one.token_ids) for output in known.values() for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in prompts)},
    }


class Chunks:
    """A stream's chunks: what all of them begin with, and what has been used where the client wants to know.

    num_streams: the engine's requests. num_copies: as in `usage_of`.
    """

    def __init__(self, body: SamplingFields, head: dict[str, Any], num_streams: int, num_copies: int) -> None:
        self._body, self._head, self._num_copies = body, head, num_copies
        self._latest: list[RequestOutput | None] = [None] * num_streams

    def note(self, stream: int, output: RequestOutput) -> None:
        """The latest output of one of the engine's requests."""
        self._latest[stream] = output

    def chunk(self, choice: dict[str, Any]) -> bytes:
        return self._chunk([choice], tells_usage=self._body.tells_usage_so_far)

    def end(self) -> Iterator[bytes]:
        if self._body.tells_usage:
            yield self._chunk([], tells_usage=True)
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], tells_usage: bool) -> bytes:
        usage = usage_of(self._latest, self._num_copies) if tells_usage else None
        return event({**self._head, "choices": choices, **({"usage": usage} if self._body.tells_usage else {})})
