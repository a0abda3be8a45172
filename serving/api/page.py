"""`GET /`: a page to chat on, with a live view of the mesh. Its files are those of serving/page/."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from .service import Service

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_FILES = ("index.html", "style.css", "api.js", "chat.js", "dom.js", "markdown.js", "mesh.js", "icon.svg")
PAGE_PATHS = ("/", *(f"/page/{name}" for name in _FILES[1:]))  # which a browser gets before it has a key to send

_HEADERS = {
    # What the page shows was written by a model: whatever slips through is to run nothing and reach nobody.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks each time, and hears 304
}


def page_routes(service: Service) -> APIRouter:
    """Reads the files; the page asks for all else by the API."""
    router = APIRouter(include_in_schema=False)
    folder = files("meshlm.serving") / "page"
    for path, name in zip(PAGE_PATHS, _FILES, strict=True):
        sender = _sender((folder / name).read_bytes(), _TYPES[name.rpartition(".")[2]])
        router.add_api_route(path, sender, methods=["GET", "HEAD"])
    return router


def _sender(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    etag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": etag}

    async def send(request: Request) -> Response:
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return send
