"""`POST /v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.async_engine import RequestStream
from .answers import JsonAnswer, chat_logprobs, usage_of
from .errors import ApiError
from .protocol.base import sampling_params
from .protocol.chat import ChatCompletionRequest
from .service import FINISH_REASONS, Service, checked, new_id
from .sse import DONE, EventStream, event

DEFAULT_MAX_TOKENS = None  # what the context leaves


def chat_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompt = await service.render_chat(body)
        stream = await service.add(prompt, sampling_params(_values(body, service, len(prompt))))
        if body.stream:
            return EventStream(_events(service, body, stream))
        (output,) = await service.last(request, [stream])
        choices = [
            {
                "index": one.index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": {"content": chat_logprobs(service.tokenizer, one, 0), "refusal": None}
                if body.logprobs
                else None,
                "finish_reason": FINISH_REASONS[one.finish_reason],
            }
            for one in output.outputs
        ]
        return JsonAnswer({**_head(service, "chat.completion"), "choices": choices, "usage": usage_of([output])})

    return router


def _values(body: ChatCompletionRequest, service: Service, num_prompt_tokens: int) -> dict[str, Any]:
    values = body.sampling_values()
    room = service.engine.max_model_len - num_prompt_tokens
    values["max_tokens"] = body.max_completion_tokens or body.max_tokens or max(1, room)
    if body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs is not None:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    return values


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {"id": new_id("chatcmpl"), "object": kind, "created": int(time.time()), "model": service.model_name}


async def _events(service: Service, body: ChatCompletionRequest, stream: RequestStream) -> AsyncIterator[bytes]:
    head = _head(service, "chat.completion.chunk")
    asks_usage = body.stream_options is not None and body.stream_options.include_usage
    usage = {"usage": None} if asks_usage else {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **usage})

    num_told = [0] * (body.n or 1)
    ended: set[int] = set()
    output = None
    try:
        async with asyncio.timeout(service.limits.request_timeout_s):
            for index in range(body.n or 1):
                yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
            async for output in stream:
                checked(output)
                for one in output.outputs:
                    if one.index in ended:
                        continue
                    told = None
                    if body.logprobs and one.logprobs is not None:
                        told = {"content": chat_logprobs(service.tokenizer, one, num_told[one.index]), "refusal": None}
                        num_told[one.index] = len(one.logprobs)
                    if one.delta or (told and told["content"]):
                        yield chunk(one.index, {"content": one.delta}, told)
                    if one.finish_reason is not None:
                        ended.add(one.index)
                        yield chunk(one.index, {}, None, FINISH_REASONS[one.finish_reason])
            if asks_usage and output is not None:
                yield event({**head, "choices": [], "usage": usage_of([output])})
            yield DONE
    except TimeoutError:
        raise service.timed_out() from None
    finally:
        stream.close()
