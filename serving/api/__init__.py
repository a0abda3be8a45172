"""The HTTP server: OpenAI's API on an `AsyncInferenceEngine`.

    app.py          the application: routes, and what every request goes through first
    service.py      what the routes share: the engine, the model's name, limits
    protocol/       requests and responses, as OpenAI's reference has them; ours on top
    chat.py …       one file an endpoint
    sse.py          streams of events, that end when the client goes away
    errors.py       what a client is told
"""

from .app import create_app
from .service import Service

__all__ = ["Service", "create_app"]
