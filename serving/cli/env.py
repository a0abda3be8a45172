"""`meshlm env`: what is on this machine, and what would be bound on each device."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .help import Command

if TYPE_CHECKING:
    from ..environment import Environment

_HELP = """\
Show versions, devices, and for each device and dtype

\b
  - which attention backends can serve a plain layer, or every reason why one cannot;
  - which of them --attention-backend auto takes;
  - which ops (norms, activations, rotary embedding and so on) are bound, and why no faster ones.

A layer with a sliding window or heads of another size may get other answers: engine.describe() has those of a model's
own layers. The first run on a machine compiles the C++ ops, about ten seconds.
"""
_EPILOG = """\
\b
Examples:
  meshlm env
  meshlm env --json | jq '.devices[].auto'
"""


def add_to(app: typer.Typer) -> None:
    app.command("env", cls=Command, help=_HELP, epilog=_EPILOG)(_env)


def _env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    from ..environment import describe_environment, find_environment

    environment = find_environment()
    if as_json:
        print(json.dumps(environment.as_dict(), indent=2))
    elif sys.stdout.isatty():
        _print_tables(environment)
    else:
        print(describe_environment(environment))


def _print_tables(environment: "Environment") -> None:
    """What `describe_environment` says, in colours."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..environment import backend_table, describe_device, describe_layer, describe_ops, describe_versions

    console = Console(highlight=False)
    console.print("\n".join(describe_versions(environment)), markup=False)
    for device in environment.devices:
        (header, *rows, last), reasons = backend_table(device)
        table = Table(*header)
        for name, *answers in rows:
            table.add_row(name, *(Text(answer, "green" if answer == "yes" else "dim") for answer in answers))
        table.add_section()
        table.add_row(*last, style="bold")
        console.print(f"\n{describe_device(device)}", style="bold", markup=False)
        console.print(f"{describe_layer(environment.layer)}:", markup=False)
        console.print(table)
        console.print("\n".join(reasons), style="dim", markup=False)
        console.print("\n".join(describe_ops(device)), markup=False)
