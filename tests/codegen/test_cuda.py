"""csrc/cuda compiled by nvcc for GPUs that are not here: registers, spills, machine code."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import driver, toolkit

NVCC = toolkit.found("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on this machine")
USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers", re.DOTALL,
)  # fmt: skip


def machine_code(path: Path) -> str:
    """What the disassembler inside the triton wheel reads in an object file."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("the triton here has no cuobjdump")
    return subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_rank_backward(architecture, tmp_path):
    source = next(path for path in driver.SOURCES if path.stem == "rank_backward")
    to = tmp_path / "rank_backward.o"
    command = [NVCC, "-c", "-O3", "-std=c++17", f"-arch={architecture}", "--resource-usage",
               "-Xcompiler", "-Wall,-Wextra", str(source), "-o", str(to)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "warning" not in said, said
    kernels = USAGE.findall(said)
    assert len([name for name, *_ in kernels if "backwardI" in name]) == 6  # ranks x dtypes
    for name, stores, loads, registers in kernels:
        assert int(stores) == int(loads) == 0 and int(registers) <= 255, (name, registers)
    code = machine_code(to)
    assert "HMMA.16816.F32.BF16" in code and "LDSM.16.MT88.4" in code and "LDGSTS.E" in code


def test_the_driver_builds(tmp_path):
    built = driver.compile_driver(NVCC, "sm_90a", tmp_path / "driver")
    assert built.returncode == 0, built.stdout + built.stderr
