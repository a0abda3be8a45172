"""The backend that is fastest when it is timed: what `attention_backend="tuned"` stands for.

Timed are those that "auto" may choose, and what they offer as `variants`, one layer's `forward` at a time, on random
keys and values in the shapes of a replica's steps. What is found is kept in a file for each device, versions, layer and
shapes: ``tuning/…json`` in the cache (`config/cache.py`). Remove the file to time again.
"""

import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.cache import cache_folder
from .base import AttentionBackend, AttentionSpec, Sequences
from .proof import difference
from .registry import BACKENDS, auto_backend, automatic_backends

_BATCHES = (1, 8, 32)  # sequences of a decode
_WORTHWHILE = 1.03  # a variant that is faster by less is taken for chance


@dataclass(frozen=True)
class Workload:
    """What bounds a replica's steps."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int | None  # None: the largest that a candidate prefers


@dataclass(frozen=True)
class _Limits:
    """What timing may take on a kind of device."""

    context: int  # keys of a decoding sequence
    chunk: int  # tokens of a prompt
    cache_bytes: int
    total_s: float  # what is not begun with by then is left out
    shape_s: float  # for one candidate on one shape, beside its first four runs
    runs: int


_LIMITS = {
    "cpu": _Limits(context=512, chunk=512, cache_bytes=128 << 20, total_s=3.0, shape_s=0.05, runs=20),
    "cuda": _Limits(context=4096, chunk=8192, cache_bytes=1 << 30, total_s=45.0, shape_s=0.05, runs=30),
}


@dataclass(frozen=True)
class Tuning:
    """What timing has found for a layer."""

    name: str  # of the backend that is fastest
    options: Mapping[str, Any]  # arguments of its constructor: its best variants
    block_size: int  # it was timed with
    times: Mapping[str, Mapping[str, Sequence[float]]]  # backend -> "decode", "prefill" -> ms in each shape
    failed: Mapping[str, str]  # a backend that was not timed -> why

    def bind(self, spec: AttentionSpec) -> AttentionBackend:
        """The backend that was found, for such a layer."""
        backend = BACKENDS[self.name](spec, **self.options)
        backend.tuning = self
        return backend

    def speedup(self, other: str, kind: str) -> float:
        """How many times as fast as another backend: the geometric mean over the shapes of a kind."""
        ours, theirs = self.times[self.name][kind], self.times[other][kind]
        return statistics.geometric_mean(b / a for a, b in zip(ours, theirs, strict=True))

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        chosen = f"{self.name} ({options})" if options else self.name
        others = [name for name in self.times if name != self.name]
        if not others:
            return f"{chosen}, the only one that was timed"
        decode, prefill = ({name: self.speedup(name, kind) for name in others} for kind in ("decode", "prefill"))
        total = {name: (decode[name] * prefill[name]) ** 0.5 for name in others}
        other = "eager" if "eager" in others else min(others, key=total.__getitem__)
        return (
            f"{chosen}, {total[other]:.1f} times as fast as {other} "
            f"(decode {decode[other]:.1f}, prefill {prefill[other]:.1f})"
        )


def tune(specs: Iterable[AttentionSpec], workload: Workload) -> list[AttentionBackend]:
    """For each layer the fastest backend: timed once for all that are alike, or read where that was done before."""
    found: dict[AttentionSpec, Tuning] = {}
    backends = []
    for spec in specs:
        if spec not in found:
            found[spec] = _find(spec, workload)
        backends.append(found[spec].bind(spec))
    return backends


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def package_version(package: str) -> str | None:
    """Of an installed package, which is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _find(spec: AttentionSpec, workload: Workload) -> Tuning:
    names = list(automatic_backends(spec))
    block_size = workload.block_size or max(BACKENDS[name](spec).preferred_block_size for name in names)
    key = _key(spec, workload, names, block_size)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "tuning" / f"attention-{digest}.json"
    tuning = _read(file, key, spec)
    if tuning is None:
        print(f"meshlm: timing the attention backends (kept in {file})", file=sys.stderr, flush=True)
        tuning = _measure(spec, _shapes(spec, workload, block_size), names, block_size)
        if spec.device.type == "cuda":
            torch.cuda.empty_cache()
        _write(file, {"key": key, "found": asdict(tuning)})
    return tuning


def _key(spec: AttentionSpec, workload: Workload, names: list[str], block_size: int) -> dict[str, Any]:
    """All that a measurement depends on, as plain data that JSON gives back unchanged."""
    device = {"name": device_name(spec.device)}
    if spec.device.type == "cpu":
        device |= {"instructions": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}
    package = sys.modules[__name__.partition(".")[0]]
    return {
        "device": device,
        "versions": {"meshlm": package.__version__, "torch": torch.__version__, "triton": package_version("triton")},
        "layer": {field.name: str(getattr(spec, field.name)) for field in fields(spec) if field.name != "device"},
        "steps": asdict(workload) | {"block_size": block_size},
        "limits": asdict(_LIMITS[spec.device.type]),
        "candidates": names,
    }


# ---- the file -------------------------------------------------------------------------------------------------------


def _read(file: Path, key: dict[str, Any], spec: AttentionSpec) -> Tuning | None:
    """What was found before; None where nothing was, or where the file is no good."""
    try:
        data = json.loads(file.read_text())
        if data["key"] != key:
            return None
        tuning = Tuning(**data["found"])
        for name in (tuning.name, *tuning.times):
            tuning.speedup(name, "decode"), tuning.speedup(name, "prefill")
        tuning.bind(spec)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return None
    return tuning


def _write(file: Path, data: dict[str, Any]) -> None:
    """Under another name first: of several ranks that write at once one is last, and the file always whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".tmp-", delete=False) as temporary:
            json.dump(data, temporary, indent=1)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"what tuning has found is not kept: {error}", stacklevel=2)


# ---- measuring ------------------------------------------------------------------------------------------------------


def _shapes(spec: AttentionSpec, workload: Workload, block_size: int) -> dict[str, list[Sequences]]:
    """Steps to time: decodes of a few batch sizes, and a chunk that begins a prompt."""
    limits = _LIMITS[spec.device.type]
    token_bytes = spec.token_size * spec.dtype.itemsize
    batches = sorted({min(batch, workload.max_num_seqs) for batch in _BATCHES})
    fitting = limits.cache_bytes // token_bytes // block_size * block_size
    context = max(1, min(workload.max_model_len, limits.context, fitting // batches[-1]))
    chunk = max(1, min(workload.max_num_batched_tokens, workload.max_model_len, limits.chunk, fitting))
    return {
        "decode": [_sequences([1] * batch, [context] * batch, block_size, spec.device) for batch in batches],
        "prefill": [_sequences([chunk], [chunk], block_size, spec.device)],
    }


def _sequences(query_lens: list[int], key_lens: list[int], block_size: int, device: torch.device) -> Sequences:
    """Each with blocks of its own, which lie in turn: a cache that has been used for a while is in no order."""
    counts = [-(-length // block_size) for length in key_lens]
    tables = [range(first, max(counts) * len(counts), len(counts)) for first in range(len(counts))]
    return Sequences.of(query_lens, key_lens, tables, block_size, device)


@torch.inference_mode()
def _measure(
    spec: AttentionSpec, shapes: Mapping[str, Sequence[Sequences]], names: Sequence[str], block_size: int
) -> Tuning:
    """Times what "auto" would take first, then eager, then the others, then the fastest one's variants."""
    limits = _LIMITS[spec.device.type]
    deadline = time.monotonic() + limits.total_s
    steps = {kind: [_Step(spec, sequences) for sequences in of_kind] for kind, of_kind in shapes.items()}
    times: dict[str, dict[str, list[float]]] = {}
    failed: dict[str, str] = {}

    def timed(backend: Callable[[], AttentionBackend], kinds: Iterable[str]) -> dict[str, list[float]] | str:
        """Milliseconds in each shape, or why there are none."""
        if times and time.monotonic() > deadline:
            return f"not timed: the {limits.total_s:g} s for all were over"
        try:
            bound = backend()
            return {kind: [step.time(bound, limits) for step in steps[kind]] for kind in kinds}
        except Exception as error:  # a kernel that does not compile, or does not fit on the device, has many
            return f"failed: {' '.join(str(error).split())}"

    for name in sorted(names, key=lambda name: (auto_backend(spec), "eager", name).index(name)):
        result = timed(partial(BACKENDS[name], spec), steps)
        if isinstance(result, str):
            failed[name] = result
        else:
            times[name] = result
    if not times:
        raise ValueError(f"attention_backend='tuned': none can be timed: {failed}")

    def total(name: str) -> float:
        return prod(statistics.geometric_mean(times[name][kind]) for kind in steps)

    best = min(times, key=total)
    options: dict[str, Any] = {}
    for kind, variants in BACKENDS[best].variants(spec).items():
        chosen: Mapping[str, Any] = {}
        for variant in variants:
            result = timed(partial(BACKENDS[best], spec, **variant), [kind])
            if isinstance(result, str):
                continue
            if statistics.geometric_mean(result[kind]) * _WORTHWHILE < statistics.geometric_mean(times[best][kind]):
                times[best] |= result
                chosen = variant
        options.update(chosen)
    return Tuning(best, options, block_size, times, failed)


class _Step:
    """A step of one layer: random queries, keys and values, and what eager makes of them."""

    def __init__(self, spec: AttentionSpec, sequences: Sequences) -> None:
        self.spec, self.sequences = spec, sequences
        num_blocks = 1 + max(block for table in sequences.block_tables for block in table)
        self.query = _random((sum(sequences.query_lens), spec.num_heads, spec.head_dim), spec)
        make = partial(_random, spec=spec)
        self.key_cache, self.value_cache = spec.caches(num_blocks, sequences.block_size, make)
        self.sinks = _random((spec.num_heads,), spec) if spec.has_sinks else None
        self.expected: Tensor | None = None

    def forward_of(self, backend: AttentionBackend) -> Callable[[], Tensor]:
        plan = backend.prepare(self.sequences)
        return lambda: backend.forward(self.query, self.key_cache, self.value_cache, plan, self.sinks)

    def check(self, backend: AttentionBackend) -> None:
        """Raises ValueError if it does not give what eager gives."""
        if self.expected is None:
            self.expected = self.forward_of(BACKENDS["eager"](self.spec))()
        wrong = difference(self.forward_of(backend)(), self.expected)
        if wrong is not None:
            raise ValueError(f"it does not reproduce eager: {wrong}")

    def time(self, backend: AttentionBackend, limits: _Limits) -> float:
        """Milliseconds of a `forward`, the median. Raises ValueError as `check` does, which also compiles it."""
        self.check(backend)
        forward = self.forward_of(backend)
        clock = _gpu_ms if self.spec.device.type == "cuda" else _cpu_ms
        until = time.monotonic() + limits.shape_s
        taken: list[float] = []
        while len(taken) < min(3, limits.runs) or (len(taken) < limits.runs and time.monotonic() < until):
            taken.append(clock(forward))
        return statistics.median(taken)


def _random(shape: tuple[int, ...], spec: AttentionSpec) -> Tensor:
    """Of normal distribution, the same numbers over and over: drawing them all would take longer than the timing."""
    size = prod(shape)
    generator = torch.Generator(spec.device).manual_seed(size)
    few = torch.randn(min(size, 1 << 18), generator=generator, device=spec.device).to(spec.dtype)
    return few.repeat(-(-size // len(few)))[:size].view(shape)


def _cpu_ms(forward: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    forward()
    return (time.perf_counter() - started) * 1e3


def _gpu_ms(forward: Callable[[], Tensor]) -> float:
    """On the device alone: it is given something to wait for, so that the host is ahead of it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(500_000)  # cycles: some 0.3 ms
    start.record()
    forward()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
