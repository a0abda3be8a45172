"""`POST /v1/responses`."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ApiError, unsupported
from .base import MAX_LOGPROBS, Body

LOGPROBS = "message.output_text.logprobs"  # what `include` may hold
_NOT_HERE = {  # and why
    "background": "is not supported: nothing is kept that could be asked for later",
    "previous_response_id": "is not supported: no response is kept; send the messages in 'input'",
    "conversation": "is not supported: no conversation is kept; send the messages in 'input'",
    "prompt": "is not supported: no templates are kept",
    "tools": "is not supported here; /v1/chat/completions has tools",
    "reasoning": "is not supported with this model",
}


class InputMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["message"] | None = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Sequence[Mapping[str, Any]]
    id: str | None = None  # of an output that is sent back
    status: str | None = None
    phase: str | None = None


class TextConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Mapping[str, Any] | None = None
    verbosity: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_obfuscation: bool | None = False


class ResponseRequest(Body):
    input: str | Sequence[InputMessage]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    text: TextConfig | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: Sequence[str] | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    tool_choice: str | Mapping[str, Any] | None = "auto"
    tools: Sequence[Mapping[str, Any]] | None = None
    parallel_tool_calls: bool | None = True
    max_tool_calls: int | None = None
    metadata: Mapping[str, str] | None = None
    user: str | None = None
    store: bool | None = None  # nothing is: answers say so
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: str | Mapping[str, Any] | None = None
    prompt: Mapping[str, Any] | None = None
    reasoning: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raises ApiError for what is not done, or not together."""
        for name, why in _NOT_HERE.items():
            if getattr(self, name):
                raise unsupported(name, why)
        if self.truncation == "auto":
            raise unsupported("truncation", "may only be 'disabled' here")
        if not self.input:
            raise ApiError(400, "Invalid 'input': it must not be empty", param="input", code="empty_array")
        if others := [name for name in self.include or () if name != LOGPROBS]:
            message = f"Invalid value: {others[0]!r}. Supported values are: '{LOGPROBS}'."
            raise ApiError(400, message, param="include", code="invalid_value")

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
