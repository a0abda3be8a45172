"""What a runner makes of a model once: it lies in the runner's environment and goes with it."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cached(model: str, name: str, make: Callable[[Path], Any]) -> Path:
    """`make(path)` at the first call for this model as it is now; a file or a folder."""
    source = (Path(model) / "config.json").resolve()
    key = hashlib.sha256(f"{source} {source.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    path = Path(sys.prefix) / "models" / f"{Path(model).name}-{key}-{name}"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path
