"""What `tools`, `tool_choice` and `response_format` mean for what is drawn, and for what is sent back."""

from typing import Any

from .errors import unsupported
from .protocol.chat import ChatCompletionRequest
from .response_format import structured_outputs


class ToolPlan:
    """Of one request. Raises ApiError for what cannot be done."""

    def __init__(self, body: ChatCompletionRequest, tokenizer: Any) -> None:
        if body.tools and body.tool_choice != "none":
            raise unsupported("tools", "is not supported by this server")
        self.template_options: dict[str, Any] = {}
        form = structured_outputs(body.response_format)
        self.sampling: dict[str, Any] = {} if form is None else {"structured_outputs": form}

    def parser(self) -> "ChatParser":
        """Of one choice."""
        return ChatParser()


class ChatParser:
    """From the text of one choice to what is told of it."""

    def __init__(self) -> None:
        self._content: list[str] = []

    def feed(self, delta: str) -> list[dict[str, Any]]:
        if not delta:
            return []
        self._content.append(delta)
        return [{"content": delta}]

    def finish(self) -> list[dict[str, Any]]:
        return []

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(self._content), "refusal": None}

    def finish_reason(self, reason: str) -> str:
        return reason
