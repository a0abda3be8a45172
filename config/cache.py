"""Where what was fetched, compiled or measured is kept for the next time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MESHLM_CACHE, else $XDG_CACHE_HOME/meshlm, else ~/.cache/meshlm; absolute, perhaps not made yet."""
    named = os.environ.get("MESHLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "meshlm")
    return Path(named).expanduser().absolute()
