"""The flash backend: its choice of a library, and what each is given; without a GPU, by libraries that compute eagerly.

The stand-ins have the signatures of the real functions, and refuse what those would refuse or read otherwise.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from meshlm import ConfigError, InferenceConfig, InferenceEngine
from meshlm.kernels import eager
from meshlm.shardformer.backends import (
    AttentionSpec,
    EagerBackend,
    FlashBackend,
    Sequences,
    TritonBackend,
    create_backend,
    flash,
    flash_libraries,
)
from meshlm.shardformer.backends.flash_libraries import (
    LIBRARIES,
    FlashAttention2,
    FlashAttention3,
    FlashAttention3Forward,
    FlashAttention4,
    Library,
    TorchVarlen,
)
from tiny import make_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.3, dtype=torch.bfloat16, device=CPU)
SLOPES = (0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625)

# ---- libraries that compute eagerly ---------------------------------------------------------------------------------

CALLS: list[str] = []  # the functions that were called


def lens_of(starts: Tensor, num_seqs: int) -> list[int]:
    assert starts.dtype == torch.int32 and starts.is_contiguous() and starts.shape == (num_seqs + 1,)
    assert starts[0] == 0
    return starts.diff().tolist()


def window_of(size: tuple[int | None, int | None], causal: bool, nothing: int | None = -1) -> int | None:
    """Ours, of one in their convention: keys before a query's own, and keys after it."""
    left, right = size
    assert right == 0 or (right == nothing and causal), "keys to the right would be seen"
    assert left is nothing or left == nothing or left >= 0
    return None if left == nothing else left + 1


def check_cache(query: Tensor, cache: Tensor, table: Tensor, num_seqs: int, multiple: int = 1) -> None:
    assert query.dim() == 3 and query.stride(-1) == 1 and cache.dim() == 4 and cache.is_contiguous()
    assert query.dtype == cache.dtype and query.dtype in (torch.float16, torch.bfloat16)
    assert table.dtype == torch.int32 and table.stride(-1) == 1 and table.dim() == 2 and len(table) == num_seqs
    assert cache.shape[1] % multiple == 0


def defined(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Sequence[Sequence[int]],
    query_lens: list[int],
    key_lens: list[int],
    scale: float | None,
    **features: Any,
) -> Tensor:
    assert scale is not None and len(query) == sum(query_lens)
    found = eager.AttentionFeatures(**features)
    plan = eager.plan_attention(query_lens, key_lens, table, keys.shape[1], query.dtype, CPU, found.window)
    return eager.paged_attention(query, keys, values, plan, scale, found)


def fa3_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
):
    CALLS.append("fa3_with_kvcache")
    assert k is v is qv is rotary_cos is rotary_sin is cache_batch_idx is cache_leftpad is cu_seqlens_k_new is None
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous()
    check_cache(q, k_cache, page_table, len(cache_seqlens))
    query_lens = lens_of(cu_seqlens_q, len(cache_seqlens))
    assert max_seqlen_q == max(query_lens)
    return defined(
        q,
        k_cache,
        v_cache,
        page_table.tolist(),
        query_lens,
        cache_seqlens.tolist(),
        softmax_scale,
        window=window_of(window_size, causal),
        softcap=softcap or None,
    )


def fa3_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    CALLS.append("fa3_varlen")
    assert seqused_q is seqused_k is qv is None and k.shape == v.shape and k.dim() == 3 and k.stride(-1) == 1
    num_seqs = len(cu_seqlens_q) - 1
    query_lens, key_lens = lens_of(cu_seqlens_q, num_seqs), lens_of(cu_seqlens_k, num_seqs)
    assert (max_seqlen_q, max_seqlen_k) == (max(query_lens), max(key_lens)) and sum(key_lens) == len(k)
    blocks = list(torch.arange(len(k)).split(key_lens))  # of one key
    return defined(
        q,
        k[:, None],
        v[:, None],
        [b.tolist() for b in blocks],
        query_lens,
        key_lens,
        softmax_scale,
        window=window_of(window_size, causal),
        softcap=softcap or None,
    )


def fa4_varlen(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    CALLS.append("fa4_varlen")
    assert qv is seqused_q is gather_kv_indices is None
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
    check_cache(q, k, page_table, len(seqused_k))
    query_lens, key_lens = lens_of(cu_seqlens_q, len(seqused_k)), seqused_k.tolist()
    assert (max_seqlen_q, max_seqlen_k) == (max(query_lens), max(key_lens))
    major, _ = flash_libraries.compute_capability(CPU)
    assert num_splits == (1 if major == 9 else 0), "SplitKV not supported on SM 9.0"
    assert learnable_sink is None or learnable_sink.shape == (q.shape[1],)
    features = {"window": window_of(window_size, causal, None), "softcap": softcap or None, "sinks": learnable_sink}
    return defined(q, k, v, page_table.tolist(), query_lens, key_lens, softmax_scale, **features), None


def fa2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    CALLS.append("fa2_varlen")
    assert dropout_p == 0
    num_seqs = len(cu_seqlens_q) - 1
    check_cache(q, k, block_table, num_seqs, 256)
    query_lens, key_lens = lens_of(cu_seqlens_q, num_seqs), lens_of(cu_seqlens_k, num_seqs)
    assert (max_seqlen_q, max_seqlen_k) == (max(query_lens), max(key_lens))
    assert alibi_slopes is None or (alibi_slopes.dtype == torch.float32 and alibi_slopes.shape == (q.shape[1],))
    features = {"window": window_of(window_size, causal), "softcap": softcap or None, "alibi_slopes": alibi_slopes}
    return defined(q, k, v, block_table.tolist(), query_lens, key_lens, softmax_scale, **features)


REAL_VARLEN_ATTN = varlen.varlen_attn


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    CALLS.append("varlen_attn")
    num_seqs = len(cu_seq_q) - 1
    check_cache(query, key, block_table, num_seqs, 256)
    query_lens, key_lens = lens_of(cu_seq_q, num_seqs), lens_of(cu_seq_k, num_seqs)
    assert (max_q, max_k) == (max(query_lens), max(key_lens)) and seqused_k.tolist() == key_lens
    assert seqused_k.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[2])
    window = window_of(window_size, causal=False)
    return defined(query, key, value, block_table.tolist(), query_lens, key_lens, scale, window=window)


def test_the_stand_in_for_torch_has_its_signature() -> None:
    theirs, ours = (inspect.signature(f).parameters.values() for f in (REAL_VARLEN_ATTN, varlen_attn))
    assert [(p.name, p.kind, p.default) for p in theirs] == [(p.name, p.kind, p.default) for p in ours]


class Installed(MetaPathFinder, Loader):
    """Modules that can be imported, and packages that have a version, in place of the real ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, str] = {}
        self.imported: list[str] = []

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        is_package = any(other.startswith(f"{name}.") for other in self.modules)
        return ModuleSpec(name, self, origin=str(self.folder / f"{name}.py"), is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        self.imported.append(module.__name__)
        found = self.modules[module.__name__]
        if "error" in found:
            raise found["error"]
        vars(module).update(found)

    def version(self, package: str) -> str:
        if package not in self.versions:
            raise metadata.PackageNotFoundError(package)
        return self.versions[package]

    def add(self, library: type[Library], without: Sequence[str] = (), version: str | None = None) -> None:
        """without: parts of FlashAttention-3 that its build leaves out."""
        module, _ = library.function
        if issubclass(library, FlashAttention3):
            flags = {f"FLASHATTENTION_DISABLE_{part}": True for part in without}
            (self.folder / f"{library.config}.py").write_text(f"CONFIG = {{'build_flags': {flags}}}\n")
            functions = {"flash_attn_with_kvcache": fa3_with_kvcache, "flash_attn_varlen_func": fa3_varlen}
            self.modules |= {module: functions, library.config: {}}
        elif library is not TorchVarlen:
            function = fa2_varlen if library is FlashAttention2 else fa4_varlen
            self.modules |= {module: {"flash_attn_varlen_func": function}}
            self.modules.setdefault("flash_attn", {})
        self.versions[library.package] = version or library.oldest or "1"


FORWARD_ONLY = ("BACKWARD", "PAGEDKV", "LOCAL", "FP16")  # as fa3-fwd is built


class Rest(EagerBackend):
    """In Triton's place."""

    name = "triton"

    def forward(self, *args: Any) -> Tensor:
        CALLS.append("triton")
        return super().forward(*args)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """No library at first, on a device that says it is a Hopper GPU."""
    CALLS.clear()
    finder = Installed(tmp_path)
    names = ("flash_attn", "flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(metadata, "version", finder.version)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    for module in (flash, flash_libraries):
        monkeypatch.setattr(module, "TritonBackend", Rest)
    on_device(monkeypatch, 9)
    yield finder
    for name in names:
        sys.modules.pop(name, None)


def on_device(monkeypatch: pytest.MonkeyPatch, major: int, minor: int = 0) -> None:
    for module in (flash, flash_libraries):
        monkeypatch.setattr(module, "compute_capability", lambda device: (major, minor))


# ---- calls ----------------------------------------------------------------------------------------------------------

DECODES = ([1, 1, 1], [300, 7, 1])  # queries, keys
CHUNKS = ([5, 4], [261, 9])
PROMPTS = ([9, 3], [9, 3])
STEPS = {
    "decodes": DECODES,
    "chunks": CHUNKS,
    "prompts": PROMPTS,
    "mixed": ([1, 9, 5, 1, 3, 1], [300, 9, 261, 7, 3, 1]),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"has_sinks": True},
    "ALiBi": {"alibi_slopes": SLOPES},
    "window, softcap": {"window": 6, "softcap": 2.0},
}


def sequences_of(step: tuple[list[int], list[int]], block_size: int, device: torch.device = CPU) -> Sequences:
    """Over blocks in no order, each table longer than it need be."""
    counts = [-(-length // block_size) + 1 for length in step[1]]
    order = torch.randperm(sum(counts)).split(counts)
    return Sequences.of(step[0], step[1], [blocks.tolist() for blocks in order], block_size, device)


def compare(backend: Any, spec: AttentionSpec, step: tuple[list[int], list[int]], block_size: int) -> None:
    sequences = sequences_of(step, block_size, spec.device)
    num_blocks = sum(map(len, sequences.block_tables))
    shape = (2, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    keys, values = torch.randn(shape).to(spec.device, spec.dtype)
    both = torch.randn(sum(step[0]), 2 * spec.num_heads, spec.head_dim).to(spec.device, spec.dtype)
    query = both[:, : spec.num_heads]  # a slice, as of a fused projection
    sinks = torch.linspace(-1, 2, spec.num_heads, device=spec.device).to(spec.dtype) if spec.has_sinks else None
    reference = EagerBackend(spec)
    expected = reference.forward(query, keys, values, reference.prepare(sequences), sinks)
    out = backend.forward(query, keys, values, backend.prepare(sequences), sinks)
    assert out.shape == query.shape and out.dtype == spec.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def all_to(function: str) -> dict[str, set[str]]:
    """Which functions are called in each step."""
    return {step: {function} for step in STEPS}


def decodes_to_triton(function: str) -> dict[str, set[str]]:
    return {**all_to(function), "decodes": {"triton"}, "mixed": {function, "triton"}}


def prompts_alone_to(function: str) -> dict[str, set[str]]:
    return {**decodes_to_triton(function), "chunks": {"triton"}}


CASES: list[tuple[type[Library], int, Sequence[str], dict[str, set[str]]]] = [
    (FlashAttention3, 9, (), all_to("fa3_with_kvcache")),
    (FlashAttention3, 9, ("SPLIT",), decodes_to_triton("fa3_with_kvcache")),
    (FlashAttention3, 9, ("PAGEDKV",), prompts_alone_to("fa3_varlen")),
    (FlashAttention3Forward, 9, FORWARD_ONLY, prompts_alone_to("fa3_varlen")),
    (FlashAttention4, 10, (), all_to("fa4_varlen")),
    (FlashAttention4, 9, (), decodes_to_triton("fa4_varlen")),
    (FlashAttention2, 8, (), all_to("fa2_varlen")),
    (TorchVarlen, 8, (), all_to("varlen_attn")),
]


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[1]} {' '.join(case[2])}")
def test_forward(case: Any, features: str, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each library gives what eager gives, in batches of every kind, or says that it has no such feature."""
    library, major, without, calls = case
    on_device(monkeypatch, major)
    installed.add(library, without)
    spec = replace(SPEC, **FEATURES[features])
    if not all(name in library.extras and not ("LOCAL" in without and name == "window") for name in spec.features):
        assert library.validate(spec) and FlashBackend.validate(spec)
        return
    backend = create_backend("flash", spec)
    assert isinstance(backend, FlashBackend) and type(backend.library) is library
    for name, step in STEPS.items():
        CALLS.clear()
        for block_size in {backend.preferred_block_size, library.block_multiple * 3}:
            compare(backend, spec, step, block_size)
        if library is FlashAttention2 and {"window", "ALiBi"} & set(spec.features):
            calls = decodes_to_triton("fa2_varlen")  # it does not split keys then
        assert set(CALLS) == calls[name], name


def test_as_many_key_heads_as_query_heads(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attn_varlen_func` does not split keys then; torch's own does."""
    on_device(monkeypatch, 8)
    spec = replace(SPEC, num_kv_heads=6)
    installed.add(TorchVarlen)
    compare(create_backend("flash", spec), spec, DECODES, 256)
    assert CALLS == ["varlen_attn"]
    installed.add(FlashAttention2)
    compare(create_backend("flash", spec), spec, STEPS["mixed"], 256)
    assert CALLS[1:] == ["triton", "fa2_varlen"]


def test_an_empty_step(installed: Installed) -> None:
    installed.add(FlashAttention3)
    backend = create_backend("flash", SPEC)
    query, cache = torch.empty(0, 6, 16, dtype=SPEC.dtype), torch.zeros(2, 16, 2, 16, dtype=SPEC.dtype)
    assert backend.forward(query, cache, cache, backend.prepare(Sequences.of([], [], [], 16, CPU))).shape == query.shape
    assert not CALLS


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_the_first_of_the_installed_ones_is_taken_and_no_other_imported(installed: Installed) -> None:
    for library in reversed(LIBRARIES):
        installed.add(library)
        assert not FlashBackend.validate(SPEC)
        assert not installed.imported, "asking is not choosing"
        backend = create_backend("flash", SPEC)
        assert isinstance(backend, FlashBackend) and type(backend.library) is library
        assert {name.split(".")[0] for name in installed.imported} <= {library.function[0].split(".")[0]}
        assert backend.preferred_block_size == library.preferred_block_size
        installed.imported.clear()
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "fa3_fwd_interface"):
            sys.modules.pop(name, None)


def test_a_layer_takes_a_library_that_serves_it(installed: Installed) -> None:
    for library in LIBRARIES:
        installed.add(library)
    for features, block_size, library in (
        ("window", None, FlashAttention3),
        ("sinks", None, FlashAttention4),
        ("ALiBi", None, FlashAttention2),
        ("ALiBi", 512, FlashAttention2),
    ):
        backend = create_backend("flash", replace(SPEC, **FEATURES[features], block_size=block_size))
        assert isinstance(backend, FlashBackend) and type(backend.library) is library
    keys = {create_backend("flash", replace(SPEC, **FEATURES[name])).plan_key for name in ("plain", "window", "ALiBi")}
    assert keys == {"flash (FlashAttention-3)", "flash (FlashAttention-2 and triton)"}


def test_one_that_cannot_be_imported(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.add(FlashAttention3)
    installed.modules["flash_attn_interface"] = {"error": ImportError("undefined symbol:\n_ZN3c10")}
    with pytest.raises(ValueError) as error:
        create_backend("flash", SPEC)
    assert str(error.value) == (
        "attention_backend='flash' cannot serve here: FlashAttention-3 cannot be imported: undefined symbol: _ZN3c10"
    )
    monkeypatch.setattr(Library, "supports_graphs", True)  # else "auto" does not ask it
    with pytest.warns(UserWarning, match="'auto' passes over 'flash': FlashAttention-3 cannot be imported"):
        assert create_backend("auto", SPEC).name in ("cpu", "eager")
    installed.add(TorchVarlen)
    backend = create_backend("flash", SPEC)
    assert isinstance(backend, FlashBackend) and type(backend.library) is TorchVarlen


@pytest.mark.parametrize(
    ("library", "without", "majors"),
    [
        (FlashAttention3, (), {9}),
        (FlashAttention3, ("SPLIT",), set()),
        (FlashAttention3Forward, FORWARD_ONLY, set()),
        (FlashAttention4, (), {10, 11}),
        (FlashAttention2, (), {8}),
        (TorchVarlen, (), {8}),
    ],
)
def test_automatic(
    library: type[Library],
    without: Sequence[str],
    majors: set[int],
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the kernels were made for the device, and serve decodes as well; once they run from CUDA graphs."""
    installed.add(library, without)
    on_device(monkeypatch, max(majors, default=9))
    assert not FlashBackend.is_automatic(SPEC)
    monkeypatch.setattr(Library, "supports_graphs", True)
    found = set()
    for major in (7, 8, 9, 10, 11, 12):
        on_device(monkeypatch, major)
        if FlashBackend.is_automatic(SPEC):
            found.add(major)
    assert found == majors


# ---- reasons --------------------------------------------------------------------------------------------------------

ALL_MISSING = "not installed: flash_attn_3, fa3-fwd, flash-attn-4 >= 4.0.0b30, flash-attn >= 2.6, torch >= 2.13"


def test_nothing_is_installed(installed: Installed) -> None:
    installed.versions["torch"] = "2.12.1+cu130"
    assert FlashBackend.validate(SPEC) == [ALL_MISSING]
    assert not FlashBackend.is_automatic(SPEC)


def test_every_reason_is_told(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flash, flash_libraries):
        monkeypatch.setattr(module, "compute_capability", lambda device: None)
    spec = replace(SPEC, dtype=torch.float32, head_dim=260, has_sinks=True, block_size=16)
    installed.add(TorchVarlen)
    assert FlashBackend.validate(spec) == [
        "the device is cpu, not a CUDA GPU",
        "dtype torch.float32 is not one of torch.float16, torch.bfloat16",
        "head_dim=260 is not a multiple of 8 up to 256",
        "torch's varlen_attn has no sinks",
        "torch's varlen_attn needs block sizes that are multiples of 256, not 16",
        ALL_MISSING.removesuffix(", torch >= 2.13"),
    ]


LACKING: list[tuple[type[Library], int, Sequence[str], dict[str, Any], list[str]]] = [
    (FlashAttention3, 8, (), {}, ["has no kernels for compute capability 8.0"]),
    (FlashAttention3, 9, (), {"has_sinks": True, "alibi_slopes": SLOPES}, ["has no sinks", "has no ALiBi"]),
    (FlashAttention3, 9, ("SOFTCAP",), {"softcap": 1.0}, ["was built without SOFTCAP"]),
    (FlashAttention3, 9, ("VARLEN",), {}, ["was built without VARLEN"]),
    (
        FlashAttention3,
        9,
        ("HDIM192", "HDIM256"),
        {"head_dim": 160},
        ["was built for heads of up to 128 elements, not 160"],
    ),
    (
        FlashAttention3Forward,
        9,
        FORWARD_ONLY,
        {"dtype": torch.float16, "window": 5},
        ["was built without LOCAL", "was built without FP16"],
    ),
    (FlashAttention4, 8, (), {}, ["has no kernels for compute capability 8.0"]),
    (FlashAttention4, 12, (), {}, ["has no kernels for compute capability 12.0"]),
    (FlashAttention4, 10, (), {"head_dim": 192}, ["has heads of up to 128 elements on this device, not 192"]),
    (FlashAttention4, 9, (), {"alibi_slopes": SLOPES}, ["has no ALiBi"]),
    (FlashAttention2, 7, (), {}, ["has no kernels for compute capability 7.0"]),
    (FlashAttention2, 8, (), {"has_sinks": True}, ["has no sinks"]),
    (FlashAttention2, 8, (), {"block_size": 128}, ["needs block sizes that are multiples of 256, not 128"]),
    (TorchVarlen, 8, (), {"softcap": 1.0, "alibi_slopes": SLOPES}, ["has no softcap", "has no ALiBi"]),
]


@pytest.mark.parametrize("case", LACKING, ids=lambda case: f"{case[0].__name__} {case[4][0]}")
def test_what_a_library_lacks(case: Any, installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    library, major, without, changes, reasons = case
    on_device(monkeypatch, major)
    installed.add(library, without)
    spec = replace(SPEC, **changes)
    assert library.validate(spec) == reasons
    told = FlashBackend.validate(spec)
    assert told[:-1] == [f"{library.name} {reason}" for reason in reasons] and told[-1].startswith("not installed: ")


def test_versions(installed: Installed) -> None:
    installed.add(FlashAttention4, version="4.0.0b29")
    assert FlashBackend.validate(SPEC)
    installed.add(FlashAttention4, version="4.0.0b36")
    assert not FlashBackend.validate(SPEC)
    installed.add(FlashAttention2, version="2.5.9.post1")
    assert not FlashAttention2.is_installed()
    installed.add(FlashAttention2, version="2.8.3.post2")
    assert FlashAttention2.is_installed()


def test_decodes_that_triton_cannot_serve(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_libraries, "TritonBackend", TritonBackend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    installed.add(FlashAttention3Forward, FORWARD_ONLY)
    assert [reason[:50] for reason in FlashAttention3Forward.validate(SPEC)] == [
        "leaves decodes to Triton: the device is cpu, not a"
    ]


# ---- in the engine --------------------------------------------------------------------------------------------------

COMMON: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "num_kv_blocks": 8, "max_num_batched_tokens": 8}
TEXTS = [[5, 6, 7], [9] * 20, [1]]


@pytest.mark.usefixtures("one_thread")
def test_block_size_follows_the_library(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, 8)
    installed.add(FlashAttention2)
    outputs = []
    for changes in ({"attention_backend": "flash"}, {"attention_backend": "eager", "block_size": 256}):
        with InferenceEngine(make_llama(head_dim=16), InferenceConfig(**COMMON, **changes)) as engine:
            assert engine.block_size == 256
            assert ("attention: flash (FlashAttention-2)" in engine.describe()) == (
                changes["attention_backend"] == "flash"
            )
            outputs.append([o.token_ids for o in engine.generate(TEXTS, {"max_tokens": 6}, progress=False)])
    assert outputs[0] == outputs[1] and set(CALLS) == {"fa2_varlen"}


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.usefixtures("one_thread")
def test_an_explicit_block_size(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, 8)
    installed.add(FlashAttention2)
    reason = (
        "FlashAttention-2 needs block sizes that are multiples of 256, not 16; not installed: flash_attn_3, fa3-fwd, "
        "flash-attn-4 >= 4.0.0b30, torch >= 2.13"
    )
    model, config = make_llama(head_dim=16), InferenceConfig(**COMMON, block_size=16)
    message = refused(lambda: InferenceEngine(model, config.replace(attention_backend="flash")))
    assert message == f"InferenceConfig.attention_backend: 'flash' cannot serve here: {reason}"
    with InferenceEngine(model, config.replace(attention_backend="eager")) as engine:
        message = refused(lambda: engine.set_attention_backend("flash"))
        assert message == f"attention_backend='flash' cannot serve here: {reason}"
        assert "attention eager" in engine.describe()


@pytest.mark.usefixtures("one_thread")
def test_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whatever is installed."""
    monkeypatch.setattr("meshlm.engine.engine.World", lambda *_: pytest.fail("a world was made"))
    config = InferenceConfig(**{**COMMON, "dtype": "float32"}, attention_backend="flash", tp_size=2)
    with pytest.raises(ConfigError) as error:
        InferenceEngine(make_llama(head_dim=16), config)
    assert str(error.value).startswith(
        "InferenceConfig.attention_backend: 'flash' cannot serve here: the device is cpu, not a CUDA GPU; dtype "
        "torch.float32 is not one of torch.float16, torch.bfloat16"
    )


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_real_libraries(library: type[Library], head_dim: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs a CUDA device and the library."""
    monkeypatch.setattr(flash, "LIBRARIES", (library,))
    heads = 2 * group
    spec = replace(SPEC, num_heads=heads, head_dim=head_dim, scale=head_dim**-0.5, device=CUDA)
    if FlashBackend.validate(spec):
        pytest.skip("; ".join(FlashBackend.validate(spec)))
    for changes in FEATURES.values():
        slopes = tuple(0.5**index for index in range(heads)) if "alibi_slopes" in changes else None
        layer = replace(spec, **{**changes, "alibi_slopes": slopes})
        if FlashBackend.validate(layer):
            continue
        backend = create_backend("flash", layer)
        for step in STEPS.values():
            for block_size in {backend.preferred_block_size, library.block_multiple * 3}:
                compare(backend, layer, step, block_size)
