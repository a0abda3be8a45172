"""Under torchrun every rank runs the same command: the first reads and tells, the others work."""

import os
import sys


def is_first_rank() -> bool:
    """True also where there is no torchrun."""
    under_torchrun = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return not under_torchrun or os.environ["RANK"] == "0"


def silence_all_but_first() -> None:
    if not is_first_rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
