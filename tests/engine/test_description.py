"""What `describe` says of what was bound, and why nothing else was."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from meshlm import InferenceConfig, InferenceEngine
from meshlm.engine.description import describe_bound
from meshlm.engine.rank_info import RankInfo
from meshlm.kernels.cpu import Unavailable
from meshlm.kernels.cpu.build import load_library
from meshlm.shardformer import backends
from meshlm.shardformer.backends import AttentionSpec, Bound, EagerBackend, create_backend
from tiny import make_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = AttentionSpec(
    num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, dtype=torch.float32, device=torch.device("cpu")
)
COMPILED = "the device is cpu, not a GPU (for tests, TRITON_INTERPRET=1 interprets kernels)"
INTERPRETED = "taken on cpu only where it is asked for by its name"


class Other(EagerBackend):
    """A slower one."""

    name = "other"

    @staticmethod
    def validate(spec: AttentionSpec) -> list[str]:
        return ["it has no window", f"{spec.device} is too cold"] if spec.window else []


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.registry, "BACKENDS", table := {"eager": EagerBackend, "other": Other})
    monkeypatch.setattr(backends.bound, "BACKENDS", table)


def bound(asked: str, *specs: AttentionSpec, first_layer: int = 0) -> tuple[Bound, ...]:
    return backends.describe_bound(asked, [create_backend(asked, spec) for spec in specs], first_layer)


def test_what_was_not_bound_has_a_reason(two_backends: None) -> None:
    assert bound("auto", SPEC, SPEC) == (Bound("eager", (0, 1), (("other", "slower"),)),)
    assert bound("eager", SPEC) == (Bound("eager", (0,), (("other", "not asked for"),)),)
    assert bound("other", SPEC) == (Bound("other", (0,), (("eager", "not asked for"),)),)


def test_layers_differ(two_backends: None) -> None:
    windowed, refusal = replace(SPEC, window=4), (("other", "it has no window; cpu is too cold"),)
    assert bound("auto", windowed, SPEC, windowed, first_layer=6) == (
        Bound("eager", (6, 8), refusal),
        Bound("eager", (7,), (("other", "slower"),)),
    )


def test_one_of_several_devices_reads_like_another(two_backends: None) -> None:
    (found,) = backends.describe_bound(
        "eager", [EagerBackend(replace(SPEC, window=4, device=torch.device("meta", 3)))], 0
    )
    assert found.refused == (("other", "it has no window; meta is too cold"),)


def test_a_backend_for_tests_is_not_called_slower(two_backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Other, "is_automatic", staticmethod(lambda spec: False))
    assert bound("auto", SPEC)[0].refused == (("other", INTERPRETED),)


# ---- lines ----------------------------------------------------------------------------------------------------------


def rank(number: int, layers: tuple[int, int], attention: tuple[Bound, ...], ops: str = "C++") -> RankInfo:
    """Of these numbers; all else stands still."""
    rest: dict[str, Any] = dict.fromkeys(RankInfo.__dataclass_fields__)
    return RankInfo(**{**rest, "rank": number, "layers": layers, "attention": attention, "ops": ops})


def of(name: str, start: int, stop: int, **refused: str) -> Bound:
    return Bound(name, tuple(range(start, stop)), tuple(refused.items()))


def test_ranks_that_are_alike_are_one() -> None:
    """Two stages of two tensor shards."""
    ranks = [rank(n, (0, 18), (of("cpu", 0, 18, eager="slower"),)) for n in range(2)]
    ranks += [rank(n, (18, 30), (of("cpu", 18, 30, eager="slower"),)) for n in (2, 3)]
    assert describe_bound(ranks) == ["attention: cpu in layers 0-29", "  not eager: slower", "ops: C++"]
    assert ranks[0].attention_backends == ("cpu",)


def test_stages_that_differ_are_told_apart_by_their_layers() -> None:
    ranks = [rank(0, (0, 1), (of("cpu", 0, 1),)), rank(1, (1, 3), (of("eager", 1, 3, cpu="no"),), ops="eager (no)")]
    assert describe_bound(ranks) == [
        "attention: cpu in layer 0",
        "attention: eager in layers 1-2",
        "  not cpu: no",
        "ops on rank 0: C++",
        "ops on rank 1: eager (no)",
    ]


def test_ranks_of_one_stage_that_differ_are_named() -> None:
    ranks = [rank(n, (0, 4), (of("cpu", 0, 4, eager="slower"),)) for n in (0, 1, 3)]
    windows = Bound("cpu", (0, 2), (("eager", "slower"),)), Bound("eager", (1, 3), (("cpu", "a window"),))
    assert describe_bound([*ranks[:2], rank(2, (0, 4), windows), ranks[2]])[:-1] == [
        "attention on ranks 0-1, 3: cpu in layers 0-3",
        "attention on rank 2: cpu in layers 0, 2",
        "  not eager: slower",
        "attention on rank 2: eager in layers 1, 3",
        "  not cpu: a window",
    ]


# ---- in an engine ---------------------------------------------------------------------------------------------------


def test_an_engine_says_what_it_has_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    try:
        load_library()
    except Unavailable as reason:
        pytest.skip(f"there is only eager here: {reason}")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with InferenceEngine(make_llama(head_dim=16), InferenceConfig(device="cpu", num_kv_blocks=8)) as engine:
        lines = engine.describe().splitlines()
        start = lines.index("attention: cpu in layers 0-2")
        assert lines[start + 1].startswith("  not flash: the device is cpu, not a CUDA GPU; dtype")
        assert lines[start + 2 : start + 4] == [f"  not triton: {COMPILED}", "  not eager: slower"]
        assert lines[start + 4] == f"ops: {engine.ranks[0].ops}"
        assert "not triton" not in engine.describe_mesh()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        engine.set_attention_backend("eager")
        (bound,) = engine.ranks[0].attention
        assert (bound.name, bound.layers) == ("eager", (0, 1, 2))
        assert bound.refused[1:] == (("triton", "not asked for"), ("cpu", "not asked for"))
        engine.set_attention_backend("auto")
        refused = dict(engine.ranks[0].attention[0].refused)
        assert "not a CUDA GPU" in refused.pop("flash") and refused == {"triton": INTERPRETED, "eager": "slower"}
