"""The command line, ``meshlm`` or ``python -m meshlm``. A command imports what it needs when it runs."""

import argparse
import json
import sys
from typing import NoReturn

_EXAMPLES = """\
examples:
  meshlm env                  what is on this machine, and what would be bound on each device
  meshlm env --json           the same for programs
  meshlm env --help           what the table says

exit codes: 0 done, 1 failed, 2 a wrong argument, 130 interrupted
"""
_ENV = """\
Prints versions, devices, and for each device and dtype

  - which attention backends can serve a plain layer, or every reason why one cannot;
  - which of them attention_backend="auto" takes;
  - which ops (norms, activations, rotary embedding and so on) are bound, and why no faster ones.

A layer with a sliding window or heads of another size may get other answers; engine.describe() has those of a
model's own layers. The first run on a machine compiles the C++ ops, about ten seconds.
"""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; gives its exit code. A wrong argument exits with 2."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="meshlm",
        description="Inference of transformers causal language models on a DP × PP × TP process mesh.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    env = commands.add_parser(
        "env",
        help="versions, devices, and which attention backends and ops work on them",
        description=_ENV,
        formatter_class=raw,
    )
    env.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if options.command is None:
        parser.error("no command is given; there is env")
    try:
        return _env(options.json)
    except KeyboardInterrupt:
        return 130


def _env(as_json: bool) -> int:
    from .environment import describe_environment, find_environment

    environment = find_environment()
    print(json.dumps(environment.as_dict(), indent=2) if as_json else describe_environment(environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
