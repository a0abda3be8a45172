"""Parts of answers that several endpoints give."""

from collections.abc import Sequence
from typing import Any

import orjson
from starlette.responses import Response

from ...engine.output import CompletionOutput, RequestOutput


class JsonAnswer(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    prompt = sum(output.num_prompt_tokens for output in outputs)
    completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


def chat_logprobs(tokenizer: Any, output: CompletionOutput, first: int) -> list[dict[str, Any]]:
    """Of the tokens from the `first` on."""
    assert output.logprobs is not None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token_id])
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return [
        entry(token_id, told.logprob)
        | {"top_logprobs": [entry(*pair) for pair in zip(told.top_ids, told.top_logprobs, strict=True)]}
        for token_id, told in zip(output.token_ids[first:], output.logprobs[first:], strict=True)
    ]
