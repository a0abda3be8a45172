"""Parts of answers that several endpoints give."""

from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from ...engine.output import RequestOutput


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
