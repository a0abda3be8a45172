"""Attention backends: which one is chosen, why others are not, and how layers of one stage share their plans."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager
from meshlm.shardformer import backends
from meshlm.shardformer.backends import AttentionSpec, EagerBackend, Sequences, TritonBackend, create_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3, dtype=torch.float32, device=CPU)
SEQUENCES = Sequences.of([5, 1], [9, 12], [[3, 1, 0], [2, 4, 5]], block_size=4, device=CPU)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


def test_triton_on_the_cpu(compiled: None) -> None:
    assert TritonBackend.validate(SPEC) == [
        "the device is cpu, not a GPU (for tests, TRITON_INTERPRET=1 interprets kernels)"
    ]


def test_the_interpreter_serves_by_name_alone(interpreted: None) -> None:
    pytest.importorskip("triton")
    assert TritonBackend.validate(SPEC) == []
    assert create_backend("auto", SPEC).name == "eager"
    assert create_backend("triton", SPEC).name == "triton"


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    monkeypatch.setattr(backends.registry, "BACKENDS", {n: Chosen(b) for n, b in backends.BACKENDS.items()})
    monkeypatch.setattr(backends.triton, "find_spec", lambda name: name)
    for capability, name in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "eager")):
        gpu(monkeypatch, *capability)
        assert create_backend("auto", replace(SPEC, device=CUDA)) is backends.BACKENDS[name]


class Chosen:
    """A backend whose construction tells which it is."""

    def __init__(self, backend: Any) -> None:
        self.validate, self.is_automatic, self.backend = backend.validate, backend.is_automatic, backend

    def __call__(self, spec: AttentionSpec) -> Any:
        return self.backend


def test_every_reason_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, 7, 0)
    monkeypatch.setattr(backends.triton, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        create_backend("triton", replace(SPEC, device=CUDA, dtype=torch.float64, head_dim=264))
    assert str(error.value) == (
        "attention_backend='triton' cannot serve here: the package triton is not installed; cuda:0 has compute "
        "capability 7.0, Triton's products need 8.0; dtype torch.float64 is not one of torch.float32, torch.bfloat16, "
        "torch.float16; heads of 264 elements are larger than 256"
    )


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"^attention_backend='telepathy' is unknown; known: auto, tuned, flash"):
        create_backend("telepathy", SPEC)


def test_layers_share_a_plan_where_it_is_the_same(interpreted: None) -> None:
    pytest.importorskip("triton")
    specs = [SPEC, replace(SPEC, window=4), replace(SPEC, window=9), replace(SPEC, window=4)]
    assert len({EagerBackend(spec).plan_key for spec in specs}) == 3, "masks are the window's"
    assert len({TritonBackend(spec).plan_key for spec in specs}) == 1


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "all": {"window": 6, "softcap": 2.0, "has_sinks": True, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "values of 5": {"value_dim": 5, "window": 6},
    "values in keys": {"value_dim": 3, "values_in_keys": True, "softcap": 2.0},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_forward(name: str, features: str, request: pytest.FixtureRequest) -> None:
    """A layer's spec, and the sinks that it is given, reach the kernel."""
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled here: tests/kernels/test_paged_attention.py runs them")
        request.getfixturevalue("interpreted")
    spec = replace(SPEC, **FEATURES[features])
    query, sinks = torch.randn(6, 4, 8), torch.randn(4)
    keys, values = spec.caches(6, 4, torch.randn)
    backend = create_backend(name, spec)
    given: tuple[Tensor, ...] = (sinks,) if spec.has_sinks else ()
    out = backend.forward(query, keys, values, backend.prepare(SEQUENCES), *given)
    plan = eager.plan_attention(
        SEQUENCES.query_lens, SEQUENCES.key_lens, SEQUENCES.block_tables, 4, torch.float32, CPU, spec.window
    )
    defined = eager.AttentionFeatures(
        window=spec.window,
        softcap=spec.softcap,
        sinks=sinks if spec.has_sinks else None,
        alibi_slopes=torch.tensor(spec.alibi_slopes) if spec.alibi_slopes else None,
    )
    assert out.shape == (6, 4, spec.value_size)
    torch.testing.assert_close(out, eager.paged_attention(query, keys, values, plan, spec.scale, defined))


def test_caches_of_a_layer() -> None:
    """Keys and values, or keys that hold the values; counted once."""
    for changes, shapes, token_size in (
        ({}, [(7, 4, 2, 8), (7, 4, 2, 8)], 32),
        ({"value_dim": 5}, [(7, 4, 2, 8), (7, 4, 2, 5)], 26),
        ({"value_dim": 5, "values_in_keys": True}, [(7, 4, 2, 8)], 16),
    ):
        spec, made = replace(SPEC, **changes), []
        keys, values = spec.caches(7, 4, lambda shape, made=made: made.append(shape) or torch.zeros(shape))
        assert made == shapes and spec.token_size == token_size
        assert eager.values_in_keys(keys, values) == spec.values_in_keys
        values.fill_(1.0)
        assert values.shape == (7, 4, 2, spec.value_size)
        assert keys[..., :3].sum() == 0 and keys[..., 3:].mean() == spec.values_in_keys


LATENT = replace(SPEC, num_kv_heads=1, head_dim=576, value_dim=512, values_in_keys=True)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("triton", {}, None),
        ("triton", {"head_dim": 640}, "keys of 128 + 512 elements are larger than 64 + 512"),
        ("triton", {"head_dim": 64, "value_dim": 264, "values_in_keys": False}, "heads of 264 elements are larger"),
        ("cpu", {}, None),
        ("cpu", {"value_dim": 510}, "value_dim=510 is not a multiple of "),
        ("cpu", {"head_dim": 640}, "head_dim=640 is not a multiple of "),
        ("flash", {}, "values of 512 elements within the keys beside keys of 576"),
        (
            "flash",
            {"head_dim": 64, "value_dim": 32, "values_in_keys": False},
            "values of 32 elements beside keys of 64",
        ),
        ("eager", {"head_dim": 999, "value_dim": 1}, None),
    ],
)
def test_sizes_of_values(
    name: str, changes: dict[str, Any], reason: str | None, request: pytest.FixtureRequest
) -> None:
    if name == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("interpreted")
    found = backends.why_not(name, replace(LATENT, **changes))
    if found is not None and "no C++ ops" in found:
        pytest.skip(found)
    assert found is None if reason is None else reason in str(found)
