"""`attention_backend="tuned"`: what is timed, what is chosen, and the file that remembers it."""

import contextlib
import json
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from meshlm import InferenceConfig, InferenceEngine
from meshlm.kernels.cpu import Unavailable
from meshlm.kernels.cpu.build import load_library
from meshlm.shardformer import backends
from meshlm.shardformer.backends import AttentionSpec, EagerBackend, Sequences, TritonBackend, Workload, tune, tuning
from meshlm.shardformer.backends.tuning import Tuning
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, dtype=torch.float32, device=CPU)
WORKLOAD = Workload(max_num_seqs=2, max_num_batched_tokens=12, max_model_len=40, block_size=4)


class Slow(EagerBackend):
    """Takes longer than eager."""

    name, pause_s = "slow", 0.002
    paused_s = 0.0  # of all, together
    timed: list[AttentionSpec] = []  # noqa: RUF012
    preferred_block_size = 32

    def forward(self, query: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        Slow.timed.append(self.spec)
        time.sleep(self.pause_s)
        Slow.paused_s += self.pause_s
        return super().forward(query, *args)


class Wrong(EagerBackend):
    """Fast, and wrong on prompts."""

    name = "wrong"

    def forward(self, query: Tensor, *args: Any) -> Tensor:  # type: ignore[override]
        return query


class Unfit(EagerBackend):
    name = "unfit"

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        return ["it is a Tuesday"]


class ByName(EagerBackend):
    name = "by name"

    @staticmethod
    def is_automatic(spec: AttentionSpec) -> bool:
        return False


class Adjustable(Slow):
    """Has a variant that is faster, some that are not, and one that fails."""

    name = "adjustable"

    def __init__(self, spec: AttentionSpec, pause_s: float = 0.004) -> None:
        super().__init__(spec)
        self.pause_s = pause_s

    @staticmethod
    def variants(spec: AttentionSpec) -> dict[str, list[dict[str, Any]]]:
        return {
            "decode": [{"pause_s": "soon"}, {"pause_s": 0.0005}, {"pause_s": 0.002}],
            "prefill": [{"pause_s": 0.02}],
        }


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are kept for this test."""
    with contextlib.suppress(Unavailable):
        load_library()  # now: it has a cache of its own in the same place
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path))
    Slow.timed.clear()
    return tmp_path / "tuning"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The backends that there are: eager alone, until a test adds others."""
    known: dict[str, Any] = {"eager": EagerBackend}
    for module in (backends.registry, backends.bound, tuning):
        monkeypatch.setattr(module, "BACKENDS", known)
    return known


def found(spec: AttentionSpec = SPEC, workload: Workload = WORKLOAD) -> Tuning:
    (backend,) = tune([spec], workload)
    assert backend.tuning is not None and backend.name == backend.tuning.name
    return backend.tuning


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen(table: dict[str, Any]) -> None:
    table |= {"slow": Slow, "wrong": Wrong, "unfit": Unfit, "by name": ByName}
    tuned = found()
    assert tuned.name == "eager" and set(tuned.times) == {"eager", "slow"}
    assert tuned.times["slow"]["decode"][0] > 2 > tuned.times["eager"]["decode"][0]
    assert [len(tuned.times["eager"][kind]) for kind in ("decode", "prefill")] == [2, 1], "batches of 1 and 2"
    assert list(tuned.failed) == ["wrong"]
    assert tuned.failed["wrong"].startswith("failed: it does not reproduce eager: off by ")


def test_what_it_says() -> None:
    times = {"cpu": {"decode": [1.0, 2.0], "prefill": [3.0]}, "eager": {"decode": [2.0, 16.0], "prefill": [27.0]}}
    tuned = Tuning("cpu", {}, 16, times, {})
    assert str(tuned) == "cpu, 6.0 times as fast as eager (decode 4.0, prefill 9.0)"
    against = replace(tuned, name="eager", times=times | {"slow": {"decode": [9e9, 9e9], "prefill": [9e9]}})
    assert str(against) == "eager, 0.2 times as fast as cpu (decode 0.2, prefill 0.1)"
    assert str(replace(tuned, times={"cpu": times["cpu"]})) == "cpu, the only one that was timed"
    assert str(replace(tuned, options={"narrow": [16, 32]})).startswith("cpu (narrow=[16, 32]), 6.0 times")


def test_what_layers_say(table: dict[str, Any]) -> None:
    table |= {"slow": Slow, "unfit": Unfit, "by name": ByName}
    (told,) = backends.describe_bound("tuned", tune([SPEC, replace(SPEC, window=3), SPEC], WORKLOAD), 0)
    assert told.layers == (0, 1, 2) and len(told.tuned) == 2 and "times as fast as slow (decode " in told.tuned[0]
    taken = "taken on cpu only where it is asked for by its name"
    assert dict(told.refused) == {"slow": "slower", "unfit": "it is a Tuesday", "by name": taken}
    table["wrong"] = Wrong
    (told,) = backends.describe_bound("tuned", tune([SPEC], WORKLOAD), 0)
    assert dict(told.refused)["wrong"].startswith("failed: it does not reproduce eager: off by ")


def test_variants(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # By a clock that shows pauses alone: with other work on the machine, one of 0.5 ms can take more than 2.
    clock = SimpleNamespace(perf_counter=lambda: Slow.paused_s, monotonic=time.monotonic)
    monkeypatch.setattr(tuning, "time", clock)
    table["adjustable"] = Adjustable
    table["eager"] = type("Slower", (Slow,), {"name": "eager", "pause_s": 0.01})
    tuned = found()
    assert tuned.name == "adjustable" and tuned.options == {"pause_s": 0.0005}
    assert tuned.times["adjustable"]["decode"][0] < 2 < tuned.times["adjustable"]["prefill"][0]
    (backend,) = tune([SPEC], WORKLOAD)
    assert isinstance(backend, Adjustable) and backend.pause_s == 0.0005, "also when it was read from the file"


def test_there_is_an_end_to_it(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    table["slow"] = Slow
    monkeypatch.setitem(tuning._LIMITS, "cpu", replace(tuning._LIMITS["cpu"], total_s=0.0))
    assert found().failed == {"slow": "not timed: the 0 s for all were over"}


@pytest.mark.parametrize("block_size", [None, 4])
def test_block_size(block_size: int | None, table: dict[str, Any]) -> None:
    table["slow"] = Slow
    assert found(workload=replace(WORKLOAD, block_size=block_size)).block_size == (block_size or 32)


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, num_kv_heads=4, head_dim=256)], ids=["small", "large"])
def test_shapes_are_bounded(spec: AttentionSpec) -> None:
    def lengths(steps: Seq[Sequences]) -> list[tuple[int, int, int]]:
        return [(len(step.key_lens), step.query_lens[0], step.key_lens[0]) for step in steps]

    shapes = tuning._shapes(spec, Workload(20, 100, 300, 16), 16)
    assert lengths(shapes["decode"]) == [(1, 1, 300), (8, 1, 300), (20, 1, 300)]
    assert lengths(shapes["prefill"]) == [(1, 100, 100)]
    shapes = tuning._shapes(spec, Workload(1000, 1 << 20, 1 << 20, 16), 16)
    assert lengths(shapes["decode"]) == [(batch, 1, 512) for batch in (1, 8, 32)]
    assert lengths(shapes["prefill"]) == [(1, 512, 512)]
    shapes = tuning._shapes(replace(spec, num_heads=256, num_kv_heads=256, head_dim=256), Workload(99, 99, 999, 16), 16)
    assert lengths(shapes["decode"])[-1] == (32, 1, 8), "what the cache would take counts"
    for step in shapes["decode"]:
        blocks = [block for table in step.block_tables for block in table]
        assert sorted(blocks) == list(range(len(blocks)))


# ---- the file -------------------------------------------------------------------------------------------------------


def test_what_was_found_is_kept(table: dict[str, Any], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table["slow"] = Slow
    windowed = replace(SPEC, window=5)
    bound = tune([SPEC, windowed, SPEC, SPEC], WORKLOAD)
    assert len(list(cache.iterdir())) == 2, "for each kind of layer one"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith(f"meshlm: timing the attention backends (kept in {cache}")
    Slow.timed.clear()
    again = tune([SPEC, windowed], WORKLOAD)
    assert [str(backend.tuning) for backend in again] == [str(backend.tuning) for backend in bound[:2]]
    assert not Slow.timed and not capsys.readouterr().err


def test_it_is_kept_for_what_it_was_found_with(
    table: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found()
    for spec in (replace(SPEC, dtype=torch.float16), replace(SPEC, head_dim=16), replace(SPEC, num_heads=8)):
        found(spec)
    found(workload=replace(WORKLOAD, max_model_len=20))
    table["slow"] = Slow
    found()
    monkeypatch.setattr(torch, "__version__", "99.0")
    found()
    monkeypatch.setattr(tuning, "device_name", lambda device: "abacus")
    found()
    assert len(list(cache.iterdir())) == 8
    (key,) = [json.loads(f.read_text())["key"] for f in cache.iterdir() if "abacus" in f.read_text()]
    assert key["device"]["name"] == "abacus" and key["versions"]["torch"] == "99.0"
    assert {"meshlm", "triton"} < set(key["versions"]) and key["layer"]["head_dim"] == "8"


def damage(data: dict[str, Any], **values: Any) -> str:
    return json.dumps(data | {"found": data["found"] | values})


DAMAGES: dict[str, Any] = {
    "empty": lambda data: "",
    "cut short": lambda data: json.dumps(data)[:-9],
    "a list": lambda data: "[]",
    "another key": lambda data: json.dumps(data | {"key": {}}),
    "an unknown backend": lambda data: damage(data, name="telepathy"),
    "unknown options": lambda data: damage(data, options={"speed": 11}),
    "no times": lambda data: damage(data, times={}),
    "words for times": lambda data: damage(data, times={"eager": {"decode": ["a", "b"], "prefill": ["c"]}}),
    "a field too many": lambda data: damage(data, mood="good"),
    "not text": lambda data: None,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_written_anew(name: str, table: dict[str, Any], cache: Path) -> None:
    found()
    (file,) = cache.iterdir()
    good = json.loads(file.read_text())
    bad = DAMAGES[name](good)
    file.write_bytes(b"\xff\xfe\x00" if bad is None else bad.encode())
    table["eager"] = type("Counted", (Slow,), {"name": "eager", "pause_s": 0.0})
    assert found().name == "eager"
    assert Slow.timed, "it was timed again"
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["key"] == good["key"] and json.loads(file.read_text())["found"]["times"]


def test_a_folder_that_cannot_be_written(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tuning").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="what tuning has found is not kept: "):
        assert found().name == "eager"


def test_writers_at_once_leave_it_whole(tmp_path: Path) -> None:
    file, failures = tmp_path / "folder" / "x.json", list[Exception]()

    def write(number: int) -> None:
        for _ in range(30):
            tuning._write(file, {"values": [number] * 5000})
            try:
                assert len(set(json.loads(file.read_text())["values"])) == 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [f.name for f in file.parent.iterdir()] == ["x.json"]


# ---- Triton's tiles -------------------------------------------------------------------------------------------------


ONE_GROUP = replace(SPEC, num_heads=8, num_kv_heads=1)  # 17 queries are more rows than any tile has


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tiles_give_what_eager_gives(dtype: torch.dtype, interpreted: None) -> None:
    spec = replace(ONE_GROUP, dtype=dtype)
    variants = TritonBackend.variants(spec)
    assert len({str(v) for of_kind in variants.values() for v in of_kind}) == (6 if dtype == torch.float32 else 8)
    for kind, query_lens in (("decode", [1, 1]), ("prefill", [17, 1]), ("decode", [9])):
        step = tuning._Step(spec, tuning._sequences(query_lens, [21] * len(query_lens), 4, spec.device))
        for variant in variants[kind]:
            backend = TritonBackend(spec, **json.loads(json.dumps(variant)))
            assert backend.tiles is not None
            step.check(backend)  # raises where they differ


@pytest.mark.slow
def test_triton_can_be_tuned(
    interpreted: None, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(TritonBackend, "is_automatic", staticmethod(lambda spec: True))
    monkeypatch.setitem(tuning._LIMITS, "cpu", replace(tuning._LIMITS["cpu"], runs=1, shape_s=0.0, total_s=60.0))
    monkeypatch.setattr(tuning, "_WORTHWHILE", 0.0)  # the last one wins, as if it were faster
    table["eager"] = type("Slower", (Slow,), {"name": "eager", "pause_s": 0.3})
    table["triton"] = TritonBackend
    workload = replace(WORKLOAD, max_num_batched_tokens=17, max_model_len=21)
    tuned = found(ONE_GROUP, workload)
    assert tuned.name == "triton" and set(tuned.options) == {"narrow", "wide"} and not tuned.failed
    assert str(tuned).startswith("triton (narrow=(16, ")
    (backend,) = tune([ONE_GROUP], workload)
    assert isinstance(backend, TritonBackend) and backend.tiles is not None
    assert backend.tiles[0].rows == 16


# ---- in an engine ---------------------------------------------------------------------------------------------------


def test_an_engine_is_tuned(cache: Path) -> None:
    config = InferenceConfig(device="cpu", num_kv_blocks=32, block_size=4, attention_backend="tuned")
    prompts = [[5, 6, 7], list(range(10, 40))]
    model = make_llama(head_dim=16)
    with InferenceEngine(model, config.replace(attention_backend="eager")) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, {"max_tokens": 6}, progress=False)]
        assert not cache.exists()
        engine.set_attention_backend("tuned")
        (file,) = cache.iterdir()
        assert [o.token_ids for o in engine.generate(prompts, {"max_tokens": 6}, progress=False)] == expected
        lines = engine.describe().splitlines()
    with InferenceEngine(model, config) as engine:
        assert [o.token_ids for o in engine.generate(prompts, {"max_tokens": 6}, progress=False)] == expected
        assert [file] == list(cache.iterdir()), "the same layers and shapes"
        again = engine.describe().splitlines()
        name = engine.ranks[0].attention_backends[0]
    for text in (lines, again):
        start = text.index(f"attention: {name} in layers 0-2")
        assert text[start + 1].startswith(f"  tuned: {name}, ")
        assert text[start + 2].startswith("  not ")


@pytest.mark.slow
def test_ranks_are_tuned_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")  # or they would compile the C++ ops, which this cache does not have
    config = InferenceConfig(device="cpu", num_kv_blocks=32, attention_backend="tuned", tp_size=2)
    with InferenceEngine(make_llama(), config) as engine:
        assert all(rank.attention[0].tuned for rank in engine.ranks)
        assert "  tuned" in engine.describe()
        engine.generate([[1, 2, 3]], {"max_tokens": 3}, progress=False)
