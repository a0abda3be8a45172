"""What `env` finds here, and what it would say on other machines."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import meshlm
from meshlm.kernels import ops
from meshlm.serving import environment
from meshlm.serving.environment import Device, Environment, describe_environment, find_environment
from meshlm.shardformer import backends

DTYPES = ("float32", "bfloat16", "float16")


def test_what_is_here() -> None:
    found = find_environment()
    assert found.versions["meshlm"] == meshlm.__version__ and found.versions["torch"] == torch.__version__
    cpu = found.devices[0]
    assert cpu.device == "cpu" and cpu.name and 0 < cpu.free_bytes <= cpu.memory_bytes
    assert cpu.details["usable_cores"] >= 1
    assert cpu.attention["eager"] == {dtype: [] for dtype in DTYPES}
    for dtype in DTYPES:
        assert cpu.attention[cpu.auto[dtype]][dtype] == [], "what auto takes serves"
    assert json.loads(json.dumps(found.as_dict()))["devices"][0]["ops"] == cpu.ops
    text = describe_environment(found)
    assert f"meshlm {meshlm.__version__}, Python " in text and "\ncpu: " in text and "auto takes  " in text
    assert max(map(len, text.splitlines())) < 300


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.triton, "find_spec", lambda name: None)
    monkeypatch.setattr(environment, "package_version", lambda name: None)
    found = find_environment()
    assert found.versions["triton"] is None and "triton not installed" in describe_environment(found)
    for dtype in DTYPES:
        assert "the package triton is not installed" in found.devices[0].attention["triton"][dtype]


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of capability 7.5, where Triton's kernels do not run."""

    class Properties:
        major, minor, total_memory, multi_processor_count = 7, 5, 16 << 30, 40

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Turing T4")
    monkeypatch.setattr(environment, "available_bytes", lambda device: 15 << 30)
    monkeypatch.setattr(environment, "runs_on", lambda dtype, device: dtype != torch.bfloat16)
    monkeypatch.setattr(environment, "select_ops", lambda device, dtype: ops.EAGER)
    monkeypatch.setattr(backends.triton, "find_spec", lambda name: name)
    found = find_environment()
    gpu = found.devices[1]
    assert (gpu.device, gpu.name, gpu.details["capability"]) == ("cuda:0", "Turing T4", "7.5")
    assert gpu.auto == {"float32": "eager", "bfloat16": "none", "float16": "eager"}
    assert gpu.attention["eager"]["bfloat16"] == ["the device does not compute in bfloat16"]
    assert gpu.attention["cpu"]["float16"] == ["the device is cuda:0, not a CPU"]
    text = describe_environment(found)
    assert "cuda:0: Turing T4, compute capability 7.5, 40 multiprocessors, 16.0 GiB of memory, 15.0 free" in text
    assert "cuda:0 has compute capability 7.5, Triton's products need 8.0" in text


def test_the_table() -> None:
    device = Device(
        device="cpu",
        name="Abacus",
        details={"usable_cores": 1, "instructions": {"AVX2": True, "AMX-BF16": False}},
        memory_bytes=3 << 29,
        free_bytes=1 << 30,
        ops={"float32": "C++, packed linear", "float16": "C++, packed linear", "bfloat16": "eager (rust)"},
        plain_ops={"float32": ["embedding"], "float16": ["embedding"], "bfloat16": ["embedding", "rms_norm"]},
        attention={"fast": {"float32": ["no beads", "rust"], "float16": ["rust"], "bfloat16": []}},
        auto={"float32": "eager", "float16": "eager", "bfloat16": "fast"},
    )
    layer = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    flash = {"flash_attn": None, "flash_attn.cute": "4.0"}
    assert describe_environment(Environment({"meshlm": "1", "triton": None}, flash, layer, [device])) == (
        "meshlm 1, triton not installed\n"
        "FlashAttention: flash_attn.cute (4.0); not installed: flash_attn\n"
        "\n"
        "cpu: Abacus, 1 usable core, AVX2, no AMX-BF16, 1.5 GiB of memory, 1.0 free\n"
        "  which backends serve a layer of 4 query and 2 KV heads of 8:\n"
        "    attention   float32    float16  bfloat16\n"
        "    fast        no (1, 2)  no (2)   yes\n"
        "    auto takes  eager      eager    fast\n"
        "    (1) no beads\n"
        "    (2) rust\n"
        "  ops in float32, float16: C++, packed linear; in plain torch: embedding\n"
        "  ops in bfloat16: eager (rust)"
    )


def test_looking_for_a_module_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lamp", "lamp/oil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('lit')")
    (tmp_path / "lamp" / "wick.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    there: dict[str, Any] = {name: environment._is_there(name) for name in ("lamp", "lamp.oil", "lamp.wick")}
    assert there == {"lamp": True, "lamp.oil": True, "lamp.wick": True} and "lamp" not in sys.modules
    assert not environment._is_there("lamp.glass") and not environment._is_there("lantern.oil")
