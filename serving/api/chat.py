"""`POST /v1/chat/completions`: https://platform.openai.com/docs/api-reference/chat."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.async_engine import RequestStream
from ...engine.output import CompletionOutput, RequestOutput
from ...engine.prompts import PreparedRequest, Preparer
from .answers import Chunks, JsonAnswer, usage_of
from .errors import ApiError
from .logprobs import LogprobsReader, chat_logprobs
from .messages import render_chat, template_messages
from .protocol.chat import ChatCompletionRequest
from .routing import new_router
from .sampling import Sampling, new_sampling
from .service import FINISH_REASONS, Service, new_id
from .sse import EventStream
from .tools import ToolPlan


def chat_routes(service: Service) -> APIRouter:
    router = new_router()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        service.check_choices(body.num_choices)
        chat = _Chat.of(service, body)
        with chat.plan.in_its_fields():
            streams = await service.submit(request, chat.prepare, "messages")
        return EventStream(chat.events(streams)) if body.stream else await chat.answer(request, streams)

    return router


@dataclass(frozen=True)
class _Chat:
    """One request for a completion."""

    service: Service
    body: ChatCompletionRequest
    plan: ToolPlan
    sampling: Sampling
    head: dict[str, Any]  # what answers and chunks begin with

    @classmethod
    def of(cls, service: Service, body: ChatCompletionRequest) -> "_Chat":
        plan = ToolPlan(body, service.tokenizer, service.dialect)
        values = body.sampling_values()
        if both := {*plan.sampling} & {*values}:
            message = f"'{both.pop()}' cannot be given beside 'response_format' or 'tools', which say the same"
            raise ApiError(400, message, param="response_format")
        if body.logprobs:
            values["logprobs"] = body.top_logprobs or 0
        max_tokens = body.max_completion_tokens or body.max_tokens
        defaults = service.engine.engine.default_params
        sampling = new_sampling(values | plan.sampling, defaults, max_tokens, "messages")
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = {"id": new_id("chatcmpl"), "object": kind, "created": int(time.time()), "model": service.model_name}
        return cls(service, body, plan, sampling, head | {"system_fingerprint": service.fingerprint})

    def prepare(self, preparer: Preparer) -> list[PreparedRequest]:
        given = template_messages([message.model_dump(exclude_unset=True) for message in self.body.messages])
        options = {**self.plan.template_options, **(self.body.chat_template_kwargs or {})}
        return self.sampling.prepare(preparer, [render_chat(preparer.tokenizer, self.plan.messages(given), options)])

    async def answer(self, request: Request, streams: list[RequestStream]) -> Response:
        is_enough = self._has_its_calls() if self.plan.is_of_one_call else None
        with self.plan.in_its_fields():
            outputs = await self.service.last(request, streams, is_enough=is_enough)
        choices = [
            self._choice(self._index(stream, one), one)
            for stream, output in enumerate(outputs)
            for one in output.outputs
        ]
        return JsonAnswer({**self.head, "choices": choices, "usage": usage_of(outputs, len(outputs))})

    def _has_its_calls(self) -> Callable[[int, RequestOutput], bool]:
        """Says of a request's outputs, as they come, whether what else is drawn would be left out."""
        choices: dict[int, _Choice] = {}

        def is_enough(stream: int, output: RequestOutput) -> bool:
            for one in output.outputs:
                index = self._index(stream, one)
                if index not in choices:
                    choices[index] = _Choice(self, index)
                choices[index].chunks(one)
            return self._have_ended(choices, stream)

        return is_enough

    def _index(self, stream: int, one: CompletionOutput) -> int:
        return stream * self.sampling.num_outputs + one.index

    def _have_ended(self, choices: Mapping[int, "_Choice"], stream: int) -> bool:
        """Whether all choices of one of the engine's requests have."""
        first = stream * self.sampling.num_outputs
        indices = range(first, first + self.sampling.num_outputs)
        return all(index in choices and choices[index].has_ended for index in indices)

    def _choice(self, index: int, one: CompletionOutput) -> dict[str, Any]:
        parser = self.plan.parser()
        parser.feed(one.text)
        parser.finish()
        return {
            "index": index,
            "message": parser.message(),
            "logprobs": self.logprobs(self.reader(), one),
            "finish_reason": parser.finish_reason(FINISH_REASONS[one.finish_reason] or "stop"),
        }

    async def events(self, streams: list[RequestStream]) -> AsyncGenerator[bytes, None]:
        chunks = Chunks(self.body, self.head, len(streams), len(streams))
        choices: dict[int, _Choice] = {}
        with self.plan.in_its_fields():
            async with aclosing(self.service.outputs(streams)) as outputs:
                async for stream, output in outputs:
                    chunks.note(stream, output)
                    for one in output.outputs:
                        index = self._index(stream, one)
                        if index not in choices:
                            choices[index] = _Choice(self, index)
                        for choice in choices[index].chunks(one):
                            yield chunks.chunk(choice)
                    if self._have_ended(choices, stream):  # of one call, perhaps before the engine would end it
                        streams[stream].close()
        for chunk in chunks.end():
            yield chunk

    def reader(self) -> LogprobsReader:
        return LogprobsReader(self.service.engine.engine.default_params.eos_token_ids or ())

    def logprobs(self, reader: LogprobsReader, one: CompletionOutput) -> dict[str, Any] | None:
        """Of the tokens that are new to the reader."""
        if not self.body.logprobs or one.logprobs is None:
            return None
        return {"content": chat_logprobs(self.service.texts, reader.read(one)), "refusal": None}


class _Choice:
    """One choice of a stream: what has been told of it."""

    def __init__(self, chat: _Chat, index: int) -> None:
        self._chat, self._index = chat, index
        self._parser, self._reader = chat.plan.parser(), chat.reader()
        self._has_begun = self.has_ended = False

    def chunks(self, one: CompletionOutput) -> list[dict[str, Any]]:
        """The choices of the chunks that tell what is new."""
        if self.has_ended:  # another choice of the same request goes on
            return []
        deltas = self._parser.feed(one.delta) if one.delta else []
        reason = None
        if one.finish_reason is not None or self._parser.has_ended:
            self.has_ended = True
            deltas += self._parser.finish()
            reason = self._parser.finish_reason(FINISH_REASONS[one.finish_reason] or "stop")
        logprobs = self._chat.logprobs(self._reader, one)
        if logprobs is not None and logprobs["content"] and not deltas:
            deltas.append({})  # tokens of which no text has come yet
        told = [logprobs, *[None] * len(deltas)]
        chunks = [self._chunk(delta, each) for delta, each in zip(deltas, told, strict=False)]
        if not self._has_begun and (deltas or self.has_ended):
            self._has_begun = True
            content = None if deltas and "content" not in deltas[0] else ""  # of calls alone it stays so
            chunks.insert(0, self._chunk({"role": "assistant", "content": content, "refusal": None}, None))
        return [*chunks, self._chunk({}, None, reason)] if self.has_ended else chunks

    def _chunk(self, delta: dict[str, Any], logprobs: Any, reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
