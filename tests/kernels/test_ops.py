"""Which ops are chosen, and that the Triton ones compile for GPUs that are not here."""

import subprocess
import sys
import types
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from meshlm.kernels import ops, select_ops

CUDA = torch.device("cuda")


def test_every_op_has_a_kernel() -> None:
    pytest.importorskip("triton")
    from meshlm.kernels.triton_ops import TRITON

    torchs_own = {"name", "bind_linear", "bind_gated_linear", "bind_tied_linear", "likeliest"}
    for field in fields(TRITON):
        bound, eager = getattr(TRITON, field.name), getattr(ops.EAGER, field.name)
        if field.name not in torchs_own:
            assert bound is not eager and bound.__name__ == eager.__name__ == field.name
    assert isinstance(TRITON.bind_gated_linear, partial)
    assert TRITON.bind_gated_linear.keywords == {"gated_activation": TRITON.gated_activation}


def test_without_triton_the_eager_ops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "meshlm.kernels.triton_ops", None)
    with pytest.warns(UserWarning, match=r"do not run on cuda.*triton_ops"):
        assert_eager(select_ops(CUDA, torch.float32), "triton_ops")


def assert_eager(found: ops.Ops, reason: str) -> None:
    assert found.name.startswith("eager (") and reason in found.name
    assert replace(found, name="eager") == ops.EAGER


def test_a_gpu_where_triton_fails_gets_the_eager_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    module = types.SimpleNamespace(TRITON=types.SimpleNamespace(gated_activation=lambda kind: fails))
    monkeypatch.setitem(sys.modules, "meshlm.kernels.triton_ops", module)
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: torch.zeros(size, dtype=dtype))
    with pytest.warns(UserWarning, match="no compiler"):
        assert_eager(select_ops(CUDA, torch.float32), "no compiler")


@pytest.mark.cuda
def test_a_gpu_gets_triton() -> None:
    assert select_ops(CUDA, torch.float32).name == "triton"


def test_the_cpu_path_does_not_import_triton() -> None:
    program = (
        "import sys, torch; from meshlm.kernels import select_ops; select_ops(torch.device('cpu'), torch.float32); "
        "sys.exit('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90])  # 80 takes as long again
def test_kernels_compile_once_for_all_numbers_of_tokens(capability: int, tmp_path: Path) -> None:
    """With triton's own ptxas; needs no GPU."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script), str(capability), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
