"""The C++ ops as they are compiled for other processors: the tests of them once more, in a process of its own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from meshlm.kernels.cpu import Unavailable, build

try:
    build.load_library()
except Unavailable as reason:
    pytest.skip(f"no C++ ops here: {reason}", allow_module_level=True)

# What vectors are made of: 16 floats without products of bfloat16; 8 floats; 4 floats.
SETS = {"x86-64-v4": "avx512f avx512bw avx512vl", "x86-64-v3": "avx2 fma", "x86-64": ""}
FILES = ("test_cpu.py", "test_linear.py")
# On one number of threads; without what says which of oneDNN's layouts are read in place: they are this processor's.
CHOSEN = "not 1-threads and not looked_up"
RUN = """
import sys
import pytest
from meshlm.kernels.cpu import build
build._FLAGS = (*build._FLAGS, sys.argv[1])
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_ops_compiled_for(name: str) -> None:
    if platform.machine() != "x86_64" or not set(SETS[name].split()) <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip(f"this processor is no {name}")
    here = Path(__file__).parent
    command = [sys.executable, "-c", RUN, f"-march={name}", "-k", CHOSEN, *(str(here / file) for file in FILES)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
