"""Every error leaves the application as an `ApiError` does."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .errors import ApiError, failed
from .mistakes import first_mistake


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def of_a_body(request: Request, error: RequestValidationError) -> Response:
        return first_mistake(error, request.url.path).response()

    @app.exception_handler(HTTPException)
    async def of_a_route(request: Request, error: HTTPException) -> Response:
        return _of_a_route(request, error).response()

    @app.exception_handler(ClientDisconnect)
    async def of_who_has_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # for the log: nobody reads it

    @app.exception_handler(Exception)
    async def of_our_own_making(request: Request, error: Exception) -> Response:
        return failed(f"{request.method} {request.url.path}", error).response()


def _of_a_route(request: Request, error: HTTPException) -> ApiError:
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Invalid URL ({request.method} {request.url.path})", "unknown_url"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other")
        message = f"Not allowed to {request.method} on {request.url.path}: only {allowed} requests are accepted"
        code = "method_not_supported"
    return ApiError(error.status_code, message, code=code, headers=error.headers)
