"""PagesAhead: what it touches, that it waits for idleness, and that it ends."""

import time
from pathlib import Path

import pytest
import torch

from meshlm.engine.pages import HUGE_PAGE, PagesAhead, zeros


def resident_bytes(address: int) -> int:
    """Of the mapping that holds an address."""
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            start, stop = (int(end, 16) for end in name.split("-"))
            is_it = start <= address < stop
        elif is_it and name == "Rss:":
            return int(rest.split()[0]) * 1024
    return 0


@pytest.fixture
def cache() -> torch.Tensor:
    return torch.frombuffer(zeros(16 * HUGE_PAGE), dtype=torch.uint8)


def test_what_is_asked_for_is_touched_and_no_more(cache: torch.Tensor) -> None:
    first, second = cache[: 8 * HUGE_PAGE], cache[8 * HUGE_PAGE :]
    before = resident_bytes(cache.data_ptr())
    ahead = PagesAhead([(first.data_ptr(), 3 * HUGE_PAGE), (second.data_ptr(), HUGE_PAGE + 4096)], lambda: 1.0)
    if not ahead.wait(30):
        pytest.fail("it is not done")
    touched = resident_bytes(cache.data_ptr()) - before
    if not touched:
        pytest.skip("a system that cannot")
    assert 4 * HUGE_PAGE + 4096 <= touched <= 7 * HUGE_PAGE  # pages are as large as they are
    assert not cache.any()


def test_it_waits_while_steps_run_and_ends_when_told(cache: torch.Tensor) -> None:
    before = resident_bytes(cache.data_ptr())
    ahead = PagesAhead([(cache.data_ptr(), cache.nbytes)], lambda: 0.0)
    assert not ahead.wait(0.2)
    assert resident_bytes(cache.data_ptr()) == before
    started = time.monotonic()
    ahead.end()
    assert ahead.wait(0) and time.monotonic() - started < 5
