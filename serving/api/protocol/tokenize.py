"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Body
from .chat import Message, Tool


class TokenizeRequest(Body):
    """A text, or a chat's messages."""

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    add_special_tokens: bool | None = None  # None: of a text, not of a chat, whose template has them
    return_token_strs: bool | None = False
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Tool] | None = None


class DetokenizeRequest(Body):
    tokens: Sequence[int]
