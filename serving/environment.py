"""What is on this machine, and what MeshLM makes of it: for `python -m meshlm env`."""

import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from ..engine.kv_cache import available_bytes
from ..engine.plan import runs_on
from ..kernels.ops import EAGER, select_ops
from ..mesh.launch import available_cores
from ..shardformer.backends import BACKENDS, AttentionSpec, auto_backend
from ..shardformer.backends.tuning import device_name, package_version
from ..shardformer.shardformer import DTYPES

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # of the layer that backends are asked about

_FLASH = {  # module -> the package that it mostly comes with
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn.cute": "flash-attn-4",
    "torch.nn.attention.varlen": "torch",
}
_FLAGS = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX-BF16": "amx_bf16"}


@dataclass(frozen=True)
class Device:
    """A device, and what would be bound there."""

    device: str
    name: str
    details: Mapping[str, Any]
    memory_bytes: int
    free_bytes: int
    ops: Mapping[str, str]  # dtype -> what is bound, and why nothing better
    plain_ops: Mapping[str, Sequence[str]]  # dtype -> those that plain torch does; the name tells it of linear layers
    attention: Mapping[str, Mapping[str, Sequence[str]]]  # backend -> dtype -> every reason why not
    auto: Mapping[str, str]  # dtype -> the backend that "auto" takes


@dataclass(frozen=True)
class Environment:
    """Versions and devices; plain data."""

    versions: Mapping[str, str | None]
    flash: Mapping[str, str | None]  # module -> version, "found", or None
    layer: Mapping[str, int]  # that the backends were asked about
    devices: Sequence[Device]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_environment() -> Environment:
    """Looks around; nothing is taken that is not given back. C++ ops are compiled if they were not yet."""
    package = sys.modules[__name__.partition(".")[0]]
    versions = {"meshlm": package.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return Environment(
        versions={**versions, **{package: package_version(package) for package in ("triton", "transformers")}},
        flash={name: (package_version(of) or "found") if _is_there(name) else None for name, of in _FLASH.items()},
        layer={"num_heads": _HEADS, "num_kv_heads": _KV_HEADS, "head_dim": _HEAD_DIM},
        devices=[_look_at(device) for device in devices],
    )


def _is_there(module: str) -> bool:
    """Whether a module could be imported; neither it nor the package that it is in is."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # something else stands in its place
        return False
    if spec is None:
        return False
    places = [Path(place, *rest) for place in spec.submodule_search_locations or ()]
    return not rest or any(place.is_dir() or place.with_suffix(".py").exists() for place in places)


def _look_at(device: torch.device) -> Device:
    memory, details = _cuda(device) if device.type == "cuda" else _cpu()
    ops, plain_ops, auto = {}, {}, {}
    attention: dict[str, dict[str, list[str]]] = {name: {} for name in BACKENDS}
    for name, dtype in DTYPES.items():
        with warnings.catch_warnings():  # the name of what is bound says the same
            warnings.simplefilter("ignore")
            bound = select_ops(device, dtype)
        ops[name] = bound.name
        plain_ops[name] = [
            field.name
            for field in fields(EAGER)
            if not field.name.startswith(("name", "bind_")) and getattr(bound, field.name) is getattr(EAGER, field.name)
        ]
        spec = AttentionSpec(_HEADS, _KV_HEADS, _HEAD_DIM, _HEAD_DIM**-0.5, dtype, device)
        unable = [] if runs_on(dtype, device) else [f"the device does not compute in {name}"]
        for backend, cells in attention.items():
            cells[name] = unable + BACKENDS[backend].validate(spec)
        auto[name] = "none" if unable else auto_backend(spec)
    return Device(
        device=str(device),
        name=device_name(device),
        details=details,
        memory_bytes=memory,
        free_bytes=available_bytes(device),
        ops=ops,
        plain_ops=plain_ops,
        attention=attention,
        auto=auto,
    )


def _cuda(device: torch.device) -> tuple[int, dict[str, Any]]:
    properties = torch.cuda.get_device_properties(device)
    return properties.total_memory, {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def _cpu() -> tuple[int, dict[str, Any]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), None)
    known = None if flags is None else {name: flag in flags for name, flag in _FLAGS.items()}
    return psutil.virtual_memory().total, {"usable_cores": available_cores(), "instructions": known}


# ---- as text --------------------------------------------------------------------------------------------------------


def describe_environment(environment: Environment) -> str:
    """For people: the same, the reasons numbered below each table."""
    lines = describe_versions(environment)
    for device in environment.devices:
        lines += ["", *_describe_device(device, environment.layer)]
    return "\n".join(lines)


def describe_versions(environment: Environment) -> list[str]:
    versions = [f"{name} {version or 'not installed'}" for name, version in environment.versions.items()]
    found = [f"{name} ({version})" for name, version in environment.flash.items() if version is not None]
    missing = [name for name, version in environment.flash.items() if version is None]
    flash = f"FlashAttention: {', '.join(found) or 'none'}"
    return [", ".join(versions), flash + (f"; not installed: {', '.join(missing)}" if missing else "")]


def _describe_device(device: Device, layer: Mapping[str, int]) -> list[str]:
    table, reasons = backend_table(device)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        describe_device(device),
        f"  {describe_layer(layer)}:",
        *(
            "    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        ),
        *(f"    {reason}" for reason in reasons),
        *(f"  {line}" for line in describe_ops(device)),
    ]


def backend_table(device: Device) -> tuple[list[list[str]], list[str]]:
    """Rows, the first of which has the dtypes and the last what "auto" takes; and the reasons, by their numbers."""
    reasons: dict[str, int] = {}

    def answer(why_not: Sequence[str]) -> str:
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in why_not]
        return f"no ({', '.join(numbers)})" if numbers else "yes"

    table = [["attention", *device.auto]]
    table += [[name, *map(answer, cells.values())] for name, cells in device.attention.items()]
    table.append(["auto takes", *device.auto.values()])
    return table, [f"({number}) {reason}" for reason, number in reasons.items()]


def describe_layer(layer: Mapping[str, int]) -> str:
    heads = f"{layer['num_heads']} query and {layer['num_kv_heads']} KV heads of {layer['head_dim']}"
    return f"which backends serve a layer of {heads}"


def describe_device(device: Device) -> str:
    return (
        f"{device.device}: {', '.join([device.name, *_details(device.details)])}, "
        f"{device.memory_bytes / 2**30:.1f} GiB of memory, {device.free_bytes / 2**30:.1f} free"
    )


def describe_ops(device: Device) -> list[str]:
    alike: dict[tuple[str, str], list[str]] = {}
    for dtype, name in device.ops.items():
        alike.setdefault((name, ", ".join(device.plain_ops[dtype])), []).append(dtype)
    lines = []
    for (name, plain), dtypes in alike.items():
        some = f"; in plain torch: {plain}" if plain and not name.startswith("eager") else ""
        lines.append(f"ops in {', '.join(dtypes)}: {name}{some}")
    return lines


def _details(details: Mapping[str, Any]) -> list[str]:
    if "capability" in details:
        return [f"compute capability {details['capability']}", f"{details['multiprocessors']} multiprocessors"]
    cores = details["usable_cores"]
    instructions = (details["instructions"] or {}).items()
    return [
        f"{cores} usable core{'s' * (cores != 1)}",
        *(name if has else f"no {name}" for name, has in instructions),
    ]
