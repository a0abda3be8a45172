"""Responses, by the official client."""

from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from served import Server

EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def create(client: OpenAI, **values: Any) -> Any:
    given = {"model": "tiny", "input": "Name a colour", "temperature": 0, "max_output_tokens": 8}
    return client.responses.create(**{**given, **values})


def test_a_text(client: OpenAI, idle_server: Server) -> None:
    response = create(client, instructions="Be brief.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour"}]
    expected = idle_server.offline(messages, temperature=0, max_tokens=8)
    assert response.output_text == expected.text
    assert (response.object, response.status) == ("response", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.input_tokens == expected.num_prompt_tokens
    assert (response.usage.output_tokens, response.metadata) == (8, {"a": "b"})


def test_messages_and_those_that_were_answers(client: OpenAI, idle_server: Server) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    earlier = create(client).output[0].model_dump()
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {**earlier, "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        {"role": "user", "content": "Bye", "type": "message"},
    ]
    expected = idle_server.offline(messages, temperature=0, max_tokens=8)
    assert create(client, input=given).output_text == expected.text


def test_events_come_in_their_order(client: OpenAI) -> None:
    events = list(create(client, stream=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [*EVENTS, "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == create(client).output_text
    assert events[-1].response.usage.output_tokens == 8


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    tame: bool


def test_an_answer_is_parsed_as_a_pydantic_model(client: OpenAI) -> None:
    response = client.responses.parse(model="tiny", input="A pet", text_format=Pet)
    assert isinstance(response.output_parsed, Pet)
    assert response.status == "completed"
    with client.responses.stream(model="tiny", input="A pet", text_format=Pet) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Pet)


def test_log_probabilities(client: OpenAI) -> None:
    response = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    part = response.output[0].content[0]
    assert b"".join(bytes(token.bytes) for token in part.logprobs).decode() == part.text
    assert len(part.logprobs[0].top_logprobs) == 2


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("background", True),
        ("previous_response_id", "resp_1"),
        ("tools", [{"type": "web_search"}]),
        ("truncation", "auto"),
        ("reasoning", {"effort": "low"}),
    ],
)
def test_what_is_not_there_is_refused_by_name(client: OpenAI, param: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **{param: value})
    assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")


def test_an_image_is_refused(client: OpenAI) -> None:
    image = {"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}
    with pytest.raises(openai.BadRequestError, match="input_image"):
        create(client, input=[image])
