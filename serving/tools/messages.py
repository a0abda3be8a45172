"""Conversations with tool calls in them, from how OpenAI's clients send them to how chat templates expect them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .dialect import Dialect

Message = dict[str, Any]

_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")  # its templates refuse any other


class MessageError(ValueError):
    """A client's mistake in the messages. place: of the field, such as `messages[2].tool_calls`."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


def for_template(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], dialect: Dialect
) -> list[Message]:
    """tools: those that the model is told of, as templates take them.

    Arguments become dicts, and results get the names of their functions. Where the template shows no tools, they, their
    calls and their results become text of Hermes' format. Raises MessageError.
    """
    prepared = _prepared(messages)
    if dialect.tools_in == "text":
        return _as_text(prepared, tools, dialect)
    if dialect.tools_in == "system":
        return _in_system(prepared, tools, dialect)
    if dialect.has_short_ids:
        return [_with_short_ids(message) for message in prepared]
    return prepared


def _prepared(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    names: dict[str, str] = {}  # of functions, by calls' ids
    prepared = []
    for index, given in enumerate(messages):
        message = dict(given)
        if message.get("tool_calls"):
            _check_calls(message["tool_calls"], f"messages[{index}].tool_calls")
            message["tool_calls"] = [_with_dict(call) for call in message["tool_calls"]]
            message["content"] = _text(message.get("content"), f"messages[{index}].content")
            for call in message["tool_calls"]:
                names[call.get("id") or ""] = call["function"]["name"]
        else:
            message.pop("tool_calls", None)
        if message["role"] == "tool":
            message["content"] = _text(message.get("content"), f"messages[{index}].content")
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str | None):
                raise MessageError(f"messages[{index}].tool_call_id", "expected a string")
            if name := names.get(call_id or ""):
                message.setdefault("name", name)
        prepared.append(message)
    return prepared


def _check_calls(calls: Any, place: str) -> None:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise MessageError(place, "expected an array of objects")
    for index, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MessageError(f"{place}[{index}].function", "expected an object with the function's 'name'")
        if not isinstance(function.get("arguments") or "", str | dict):
            raise MessageError(f"{place}[{index}].function.arguments", "expected a string of JSON")
        if not isinstance(call.get("id"), str | None):
            raise MessageError(f"{place}[{index}].id", "expected a string")


def _with_dict(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are no JSON object, as a model may have written them, stay text."""
    function = dict(call["function"])
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError:
            value = None
        function["arguments"] = value if isinstance(value, dict) else arguments
    return {**call, "type": "function", "function": function}


def _text(content: Any, place: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    for part in content:
        if not isinstance(part.get("text"), str):
            raise MessageError(place, "expected a string or parts of text")
    return "\n".join(part["text"] for part in content)


def _name_and_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


def _with_short_ids(message: Message) -> Message:
    message = dict(message)
    if message.get("tool_call_id"):
        message["tool_call_id"] = _short_id(message["tool_call_id"])
    if "tool_calls" in message:
        message["tool_calls"] = [{**call, "id": _short_id(call.get("id") or "")} for call in message["tool_calls"]]
    return message


def _short_id(call_id: str) -> str:
    return call_id if _MISTRAL_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


# ---- templates that take tools, as JSON, in the system message -----------------------------------------------------


def _in_system(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], dialect: Dialect) -> list[Message]:
    told = [_with_list(message, dialect) for message in messages]
    if not tools:
        return told
    if not told or told[0]["role"] not in ("system", "developer"):
        told.insert(0, {"role": "system", "content": ""})
    functions = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return [{**told[0], "tools": functions}, *told[1:]]


def _with_list(message: Message, dialect: Dialect) -> Message:
    """Such templates do not show calls: they are content."""
    if "tool_calls" not in message:
        return message
    calls = [_name_and_arguments(call["function"]) for call in message["tool_calls"]]
    text = f"{dialect.format.opening}{json.dumps(calls, ensure_ascii=False)}{dialect.format.closing}"
    return {"role": "assistant", "content": message["content"] + text}


# ---- templates that show no tools --------------------------------------------------------------------------------


def _as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], dialect: Dialect) -> list[Message]:
    merged: list[Message] = []
    joins = False
    for message in messages:
        told, is_result = _told(message), message["role"] == "tool"
        if is_result and joins:  # results of calls that were made together are one message: templates want turns
            merged[-1]["content"] += "\n" + told["content"]
        else:
            merged.append(told)
        joins = is_result
    return _introduced(merged, _introduction(tools), dialect.takes_system) if tools else merged


def _told(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [_called(call["function"]) for call in message["tool_calls"]]
    return {"role": "assistant", "content": "\n".join(filter(None, [message["content"], *calls]))}


def _called(function: Mapping[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(_name_and_arguments(function), ensure_ascii=False)}\n</tool_call>"


def _introduction(tools: Sequence[Mapping[str, Any]]) -> str:
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "You may call functions to help with the user's request. Their signatures, as JSON:\n"
        f"<tools>\n{signatures}\n</tools>\n"
        "To call one, write its name and its arguments as a JSON object between these tags, once for each call:\n"
        '<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n'
        "Its result comes back between <tool_response> tags."
    )


def _introduced(messages: list[Message], introduction: str, takes_system: bool) -> list[Message]:
    """In the system message, or where there is no place for one before the first of the user's."""
    roles = [message["role"] for message in messages]
    if takes_system and (not roles or roles[0] not in ("system", "developer")):
        return [{"role": "system", "content": introduction}, *messages]
    place = 0 if takes_system or "user" not in roles else roles.index("user")
    content, parts = messages[place].get("content"), [{"type": "text", "text": introduction}]
    if isinstance(content, list):
        told: Any = content + parts if takes_system else parts + content
    else:
        texts = (content, introduction) if takes_system else (introduction, content)
        told = "\n\n".join(text for text in texts if text)
    return [*messages[:place], {**messages[place], "content": told}, *messages[place + 1 :]]
