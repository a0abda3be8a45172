"""Requests that the server's own OpenAPI description allows, and some that it does not: none makes it fail."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from meshlm.serving.api import create_app
from served import Server

LIMITS = {"completions": "max_tokens", "responses": "max_output_tokens"}  # so that valid requests are short


@pytest.mark.parametrize("num_examples", [4, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_makes_the_server_fail(idle_server: Server, mode: GenerationMode, num_examples: int) -> None:
    description = schemathesis.openapi.from_dict(create_app(idle_server.service).openapi())
    operations = [found.ok() for found in description.get_all_operations()]
    with_body = [operation for operation in operations if operation.method == "post"]
    assert len(with_body) == 6
    for operation in with_body:
        _try(operation, mode, num_examples, idle_server.url)


def _try(operation: Any, mode: GenerationMode, num_examples: int, url: str) -> None:
    limit = LIMITS.get(operation.path.rpartition("/")[2])

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(operation.as_strategy(generation_mode=mode))
    def fails_with_none(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and limit is not None:
            case.body[limit] = 2
        answer = case.call(base_url=url, timeout=30)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert {*answer.json()["error"]} == {"message", "type", "param", "code"}

    fails_with_none()
