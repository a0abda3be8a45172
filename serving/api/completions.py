"""`POST /v1/completions`: https://platform.openai.com/docs/api-reference/completions."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...engine.async_engine import RequestStream
from ...engine.output import CompletionOutput, RequestOutput
from ...engine.prompts import PreparedRequest, Preparer
from .answers import Chunks, JsonAnswer, usage_of
from .logprobs import CompletionLogprobs, LogprobsReader
from .protocol.completions import DEFAULT_MAX_TOKENS, CompletionRequest
from .routing import new_router
from .sampling import Sampling, check_context, new_sampling, place_of, prepare_each
from .service import FINISH_REASONS, Service, new_id
from .sse import EventStream


def completion_routes(service: Service) -> APIRouter:
    router = new_router()

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        body.check()
        prompts = body.prompts
        service.check_choices(len(prompts) * body.num_choices, "n" if len(prompts) == 1 else "prompt")
        completion = _Completion.of(service, body, prompts)
        streams = await service.submit(request, completion.prepare, "prompt")
        return EventStream(completion.events(streams)) if body.stream else await completion.answer(request, streams)

    return router


@dataclass(frozen=True)
class _Completion:
    """One request: of each prompt `num_copies` of the engine's requests."""

    service: Service
    body: CompletionRequest
    prompts: list[str | list[int]]
    sampling: Sampling
    head: dict[str, Any]  # what answers and chunks begin with

    @classmethod
    def of(cls, service: Service, body: CompletionRequest, prompts: list[str | list[int]]) -> "_Completion":
        values = body.sampling_values()
        if body.logprobs is not None:
            values["logprobs"] = body.logprobs
            if body.echo:
                values["prompt_logprobs"] = body.logprobs
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        sampling = new_sampling(values, service.engine.engine.default_params, max_tokens)
        head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time())}
        head |= {"model": service.model_name, "system_fingerprint": service.fingerprint}
        return cls(service, body, prompts, sampling, head)

    def prepare(self, preparer: Preparer) -> list[PreparedRequest]:
        if self.sampling.max_tokens:
            return self.sampling.prepare(preparer, self.prompts)

        def only_computed(prompt: str | list[int], place: str) -> PreparedRequest:
            """A prompt after which nothing is drawn, for its log-probabilities."""
            request = preparer.prepare_scored(prompt, None, self.body.logprobs or 0)
            check_context(preparer, len(request.token_ids), 0, place)
            return request

        requests = prepare_each("prompt", self.prompts, only_computed)
        return [request for request in requests for _ in range(self._num_each)]

    @property
    def _num_each(self) -> int:
        """Choices of each prompt."""
        return self.body.n or 1

    @property
    def _num_streams_each(self) -> int:
        """Of the engine's requests of each prompt."""
        return self.sampling.num_copies if self.sampling.max_tokens else self._num_each

    def _places(self, streams: Sequence[RequestStream]) -> list[str]:
        """Of the engine's requests' prompts, in the body."""
        count = len(self.prompts)
        return [place_of("prompt", stream // self._num_streams_each, count) for stream in range(len(streams))]

    def _index(self, stream: int, one: CompletionOutput) -> int:
        return stream * (self._num_each // self._num_streams_each) + one.index

    async def answer(self, request: Request, streams: list[RequestStream]) -> Response:
        outputs = await self.service.last(request, streams, self._places(streams))
        choices = []
        for stream, output in enumerate(outputs):
            for one in output.outputs:
                choices += _Choice(self, self._index(stream, one), self._text_of(stream, output)).told(output, one)
        return JsonAnswer({**self.head, "choices": choices, "usage": usage_of(outputs, self._num_streams_each)})

    async def events(self, streams: list[RequestStream]) -> AsyncGenerator[bytes, None]:
        chunks = Chunks(self.body, self.head, len(streams), self._num_streams_each)
        choices: dict[int, _Choice] = {}
        async with aclosing(self.service.outputs(streams, self._places(streams))) as outputs:
            async for stream, output in outputs:
                chunks.note(stream, output)
                for one in output.outputs:
                    index = self._index(stream, one)
                    if index not in choices:
                        choices[index] = _Choice(self, index, self._text_of(stream, output))
                    for choice in choices[index].told(output, one):
                        yield chunks.chunk(choice)
        for chunk in chunks.end():
            yield chunk

    def _text_of(self, stream: int, output: RequestOutput) -> str:
        """Of its prompt, as far as it is asked for."""
        if not self.body.echo and self.body.logprobs is None:
            return ""
        prompt = self.prompts[stream // self._num_streams_each]
        return prompt if isinstance(prompt, str) else self.service.texts.joined(output.prompt_token_ids)


@dataclass
class _Choice:
    """One choice: what has been told of it."""

    completion: _Completion
    index: int
    prompt: str
    has_begun: bool = False
    has_ended: bool = False
    _reader: LogprobsReader = field(init=False)
    _logprobs: CompletionLogprobs = field(init=False)

    def __post_init__(self) -> None:
        service, body = self.completion.service, self.completion.body
        self._reader = LogprobsReader(service.engine.engine.default_params.eos_token_ids or ())
        self._logprobs = CompletionLogprobs(service.texts, body.logprobs or 0, len(self.prompt))

    def told(self, output: RequestOutput, one: CompletionOutput) -> list[dict[str, Any]]:
        """What is new, as entries of "choices": none or one."""
        if self.has_ended:  # another choice of the same request goes on
            return []
        is_first, self.has_begun = not self.has_begun, True
        self.has_ended = one.finish_reason is not None
        text = one.text if is_first else one.delta
        if is_first and self.completion.body.echo:
            text = self.prompt + text
        logprobs = self._told_logprobs(output, one, is_first)
        if not (text or self.has_ended or (logprobs and logprobs["tokens"])):
            return []
        reason = FINISH_REASONS[one.finish_reason]
        return [{"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}]

    def _told_logprobs(self, output: RequestOutput, one: CompletionOutput, is_first: bool) -> dict[str, Any] | None:
        if self.completion.body.logprobs is None:
            return None
        told: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        if is_first and self.completion.body.echo and output.prompt_logprobs is not None:
            told = self._logprobs.of_prompt(self.prompt, output.prompt_token_ids, output.prompt_logprobs)
        if one.logprobs is None:
            return told
        more = self._logprobs.of_output(self._reader.read(one))
        return {name: None if more[name] is None else told[name] + more[name] for name in told}
