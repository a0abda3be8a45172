"""What the routes share: the engine, what it is called, and the limits that a deployment sets."""

import asyncio
import copy
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from starlette.requests import Request

from ...engine.async_engine import AsyncInferenceEngine, QueueFull, RequestStream
from ...engine.output import RequestOutput
from ...engine.prompts import Prompt
from .errors import ApiError
from .protocol.base import as_bad_request
from .protocol.chat import ChatCompletionRequest
from .sse import unless_disconnected

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What a deployment allows."""

    request_timeout_s: float = 600.0  # of a whole answer
    max_body_bytes: int = 8 << 20
    max_logprobs: int = 20  # OpenAI's own limit
    max_choices: int = 128  # outputs of one HTTP request: prompts times n


@dataclass(eq=False)
class Service:
    """One model behind the API. api_keys: of which a client must send one, if there are any."""

    engine: AsyncInferenceEngine
    model_names: tuple[str, ...]  # the first is what answers say
    api_keys: tuple[str, ...] = ()
    limits: Limits = Limits()
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False  # no new requests are taken
    _tokenizer: Any = None

    @property
    def model_name(self) -> str:
        return self.model_names[0]

    @property
    def is_ready(self) -> bool:
        return self.engine.is_alive and not self.is_draining

    @property
    def tokenizer(self) -> Any:
        """Of the event loop; the engine's thread has its own."""
        if self._tokenizer is None:
            self._tokenizer = copy.deepcopy(self.engine.tokenizer)
        return self._tokenizer

    async def render_chat(self, body: ChatCompletionRequest) -> list[int]:
        """The token ids of a chat, by the model's own template."""
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        options: dict[str, Any] = {"add_generation_prompt": True, **(body.chat_template_kwargs or {})}
        if body.tools:
            options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            raise ApiError(400, f"The chat template fails on these messages: {error}", param="messages") from None
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model_names:
            message = f"The model `{name}` does not exist; this server has {', '.join(self.model_names)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def add(self, prompt: Prompt, params: Any) -> RequestStream:
        """As the engine's, with errors that say their HTTP status."""
        if self.is_draining:
            raise ApiError(503, "The server is shutting down", headers={"Retry-After": "5"})
        return await self.guarded(self.engine.add(prompt, params))

    async def guarded(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except QueueFull as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            raise ApiError(429, f"Rate limit reached: {error}", code="rate_limit_exceeded", headers=headers) from None
        except (ValueError, TypeError) as error:
            raise as_bad_request(error) from None
        except RuntimeError as error:
            raise ApiError(503, f"The engine cannot serve: {str(error).splitlines()[0]}") from None

    async def last(self, request: Request, streams: "list[RequestStream]") -> list[RequestOutput]:
        """Waits for the ends of an HTTP request's requests; all are aborted if the client goes or time is up."""

        async def all_of_them() -> list[RequestOutput]:
            async with asyncio.timeout(self.limits.request_timeout_s):
                return [checked(await self.guarded(stream.last())) for stream in streams]

        try:
            return await unless_disconnected(request, all_of_them())
        except TimeoutError:
            raise self.timed_out() from None
        finally:
            for stream in streams:
                stream.close()

    def timed_out(self) -> ApiError:
        return ApiError(408, f"The request took longer than {self.limits.request_timeout_s:g} s", code="timeout")


def checked(output: RequestOutput) -> RequestOutput:
    """Raises ApiError for one that failed."""
    if output.error is not None:
        raise ApiError(400, output.error)
    return output


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


FINISH_REASONS: dict[str | None, str | None] = {None: None, "stop": "stop", "length": "length", "abort": "stop"}
