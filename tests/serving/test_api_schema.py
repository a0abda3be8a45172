"""Requests that the server's own OpenAPI description allows, and some that it does not: none makes it fail."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from served import Server


@pytest.fixture(scope="module")
def description(server: Server) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_request_makes_the_server_fail(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and "completions" in case.path:
        case.body["max_tokens"] = 2  # of a valid one
    response = case.call(timeout=30)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert {*response.json()["error"]} == {"message", "type", "param", "code"}
