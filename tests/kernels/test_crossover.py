"""Which of two products is called for how many rows: measured once, then read."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meshlm.kernels import crossover

LIKE = torch.zeros(4, 500)


@pytest.fixture(autouse=True)
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_found", {})
    monkeypatch.setattr(crossover, "_BYTES", 1)
    return tmp_path


def slow(x: Tensor, weight: Tensor) -> Tensor:
    for _ in range(30):
        F.linear(x, weight)
    return F.linear(x, weight)


def test_the_faster_is_found_kept_and_read(nothing_known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def prepare(weight: Tensor) -> Tensor:
        prepared.append(weight.shape)
        return weight

    assert crossover.streamed_rows("one", LIKE, prepare, F.linear, slow) == crossover.ROWS[-1]
    assert crossover.streamed_rows("two", LIKE, prepare, slow, F.linear) == 0
    count, files = len(prepared), sorted(path.name for path in (nothing_known / "linear").iterdir())
    assert count and prepared[0][1] == 512
    assert [name.split("-threads-")[0][:-2] for name in files] == ["one-float32-512", "two-float32-512"]
    monkeypatch.setattr(crossover, "_found", {})  # as another process
    assert crossover.streamed_rows("one", LIKE, prepare, slow, F.linear) == crossover.ROWS[-1]
    assert len(prepared) == count


@pytest.mark.parametrize(
    "content", ["", "{}", '{"ms by rows (ours, oneDNN)": {"1": [1]}}', '{"ms by rows (ours, oneDNN)": []}']
)
def test_a_broken_file_is_measured_again(nothing_known: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    crossover.streamed_rows("one", LIKE, lambda weight: weight, F.linear, slow)
    (file,) = (nothing_known / "linear").iterdir()
    file.write_text(content)
    monkeypatch.setattr(crossover, "_found", {})
    assert crossover.streamed_rows("one", LIKE, lambda weight: weight, slow, F.linear) == 0


def test_without_a_place_to_keep_it_is_measured_all_the_same(nothing_known: Path) -> None:
    (nothing_known / "linear").write_text("a file where the folder is to be")
    assert crossover.streamed_rows("one", LIKE, lambda weight: weight, slow, F.linear) == 0


def test_other_work_while_it_is_measured_does_not_decide() -> None:
    calls = 0

    def disturbed(x: Tensor, weight: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return slow(x, weight) if calls <= crossover._RUNS else F.linear(x, weight)

    def half_as_fast(x: Tensor, weight: Tensor) -> Tensor:
        F.linear(x, weight)
        return F.linear(x, weight)

    assert crossover.streamed_rows("one", LIKE, lambda weight: weight, disturbed, half_as_fast) == crossover.ROWS[-1]


def test_rows_count_up_to_the_first_that_are_slower() -> None:
    times = {"1": [1.0, 2.0], "2": [1.0, 0.95], "4": [2.0, 1.0], "8": [1.0, 2.0]}
    assert crossover.last_faster(times) == 2
    assert crossover.last_faster({}) == 0
