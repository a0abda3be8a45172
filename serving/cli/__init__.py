"""The command line, ``meshlm`` or ``python -m meshlm``: one file for each command, imported when it is called.

app.py     finds the command; ends with its exit code
errors.py  what went wrong, in one line
help.py    how help is laid out
options.py fields of `InferenceConfig` and `SamplingParams` as options
model.py   what MODEL stands for
"""

from .app import main

__all__ = ["main"]
