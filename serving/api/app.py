"""The application: its routes, and what every request goes through first."""

import hmac
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ... import __version__
from .chat import chat_routes
from .errors import ApiError, add_error_handlers
from .models import model_routes
from .observe import observe_routes
from .service import Service

_OPEN = ("/health", "/health/live", "/health/ready", "/metrics", "/version", "/")  # without a key


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="MeshLM", version=__version__, description="OpenAI's API on a mesh of ranks")
    add_error_handlers(app)
    for routes in (model_routes, chat_routes, observe_routes):
        app.include_router(routes(service))
    app.add_middleware(_BodyLimit, most=service.limits.max_body_bytes)
    if service.api_keys:
        app.add_middleware(_Keys, keys=service.api_keys)
    return app


class _Keys:
    """Lets requests through that bring one of the keys; each comparison takes as long as any other."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            token = given[7:].strip() if given[:7].lower() == b"bearer " else b""
            if not any([hmac.compare_digest(token, key) for key in self._keys]):  # noqa: C419  # all of them, always
                message = "Incorrect API key provided" if token else "You didn't provide an API key: send it as Bearer"
                error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _BodyLimit:
    """Ends a request whose body is too long, without reading it whole."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        error = ApiError(413, f"The body is larger than {self._most} bytes, which is the most")
        if declared.isdigit() and int(declared) > self._most:
            await error.response()(scope, receive, send)
            return
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._most:
                raise error
            return message

        await self.app(scope, counted, send)
