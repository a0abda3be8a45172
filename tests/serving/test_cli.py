"""The command line: what it says of mistakes, and `env`."""

import json
import os
import subprocess
import sys

import pytest

from meshlm.serving.cli import main


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "examples:" in said and "meshlm env --json" in said and "exit codes" in said
    with pytest.raises(SystemExit):
        main(["env", "--help"])
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "meshlm: error: no command is given; there is env; see meshlm --help"),
        (["evn"], "meshlm: error: argument COMMAND: invalid choice: 'evn' (choose from 'env'); see meshlm --help"),
        (["env", "--jsno"], "meshlm: error: unrecognized arguments: --jsno; see meshlm --help"),
        (
            ["env", "--json=1"],
            "meshlm env: error: argument --json: ignored explicit argument '1'; see meshlm env --help",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr()
    assert (end.value.code, said.out) == (2, "")
    assert said.err.replace("from env", "from 'env'") == told + "\n"  # Python >= 3.12 leaves the quotes out


def test_as_a_module() -> None:
    """`python -m meshlm env --json`, as a user runs it: stdout is JSON and nothing else."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "meshlm", "env", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["devices"][0]["attention"]["eager"]) == {"float32", "bfloat16", "float16"}


def test_help_imports_nothing_heavy() -> None:
    program = """
import sys
from meshlm.serving.cli import main
try:
    main(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
