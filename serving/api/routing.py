"""How a body is read: as JSON alone, whole, and by a parser that lets nothing through which answers cannot repeat."""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .errors import ApiError

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Raises json.JSONDecodeError, also for NaN, half a surrogate pair, and what is nested a thousand deep."""
        return orjson.loads(await self.body())


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            kind = request.headers.get("content-type")
            if request.method == "POST" and kind is not None and not _is_json(kind):
                message = f"Unsupported content type: {kind!r}; this method only accepts 'application/json' requests"
                raise ApiError(415, message, code="unsupported_content_type")
            scope = request.scope
            if kind is None:
                scope = {**scope, "headers": [*scope["headers"], (b"content-type", b"application/json")]}
            return await handle(_JsonRequest(scope, request.receive))

        return as_json


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def new_router() -> APIRouter:
    """A router whose bodies are JSON, with or without a content type that says so."""
    return APIRouter(route_class=_JsonRoute)
