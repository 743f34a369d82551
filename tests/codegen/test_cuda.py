"""csrc/cuda compiled by nvcc for GPUs that are not here: registers, spills, machine code."""

import re
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from benchmarks.gpu import driver, toolkit
from csrc import nvcc

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


def compiled(name: str, to: Path, architectures: tuple[str, ...], kernel: str) -> tuple:
    """What ptxas says of each kernel called ``kernel``, and all machine code."""
    command = [NVCC, "-c", "-O3", "-std=c++17", *nvcc.targets(architectures), "--resource-usage",
               "-Xcompiler=-Wall,-Wextra", str(nvcc.CUDA / f"{name}.cu"), "-o", str(to)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    said = built.stdout + built.stderr
    assert built.returncode == 0 and "warning" not in said, said
    assert "Potential Performance Loss" not in said, said  # products one after another
    found = [usage for usage in USAGE.findall(said) if kernel in usage[0]]
    for symbol, stores, loads, registers in found:
        assert int(stores) == int(loads) == 0 and int(registers) <= 255, (symbol, registers)
    return found, machine_code(to)


@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_rank_backward(architecture, tmp_path):
    to = tmp_path / "rank_backward.o"
    kernels, code = compiled("rank_backward", to, (architecture,), "backwardI")
    assert len(kernels) == 6  # ranks x dtypes
    twice = [int(usage[-1]) for usage in kernels if "Li32E" in usage[0]]
    assert len(twice) == 2 and max(twice) <= 128  # two blocks of 256 threads a multiprocessor
    assert "HMMA.16816.F32.BF16" in code and "LDSM.16.MT88.4" in code and "LDGSTS.E" in code


def test_tail_gemm(tmp_path):
    kernels, code = compiled("tail_gemm", tmp_path / "tail_gemm.o", ("90a",), "tail_gemm_kernelI")
    assert len(kernels) == 8  # dtypes x clusters x layouts
    # products of a warpgroup in both dtypes, bulk copies in, shared between blocks, and out,
    # registers handed to those who multiply; nothing in local memory
    for instruction in ("HGMMA.64x256x16.F32.BF16", "HGMMA.64x256x16.F32 ", "UTMALDG.2D ",
                        "UTMALDG.2D.MULTICAST", "UTMASTG.2D", "USETMAXREG"):  # fmt: skip
        assert instruction in code, instruction
    assert "LDL" not in code and "STL" not in code


def test_another_architecture_is_refused_by_the_tail_gemm(tmp_path):
    source = str(nvcc.CUDA / "tail_gemm.cu")
    command = [NVCC, "-c", *nvcc.targets(("80",)), source, "-o", str(tmp_path / "tail_gemm.o")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode != 0 and "for sm_90a alone" in built.stderr


def test_the_driver_builds(tmp_path):
    built = driver.compile_driver(NVCC, tmp_path)
    assert built.returncode == 0 and not built.stderr, built.stdout + built.stderr


def test_the_ops_of_torch_build_and_ask_torch_for_nothing_it_lacks(tmp_path):
    """Symbols of torch that ``_C_cuda`` needs are in this torch's libraries, but for those of a
    torch with CUDA."""
    library, lib = tmp_path / "_C_cuda.so", Path(TORCH_LIB_PATH)
    for command in nvcc.library(NVCC, library, tmp_path, include_paths(), lib):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0 and "warning" not in built.stderr, built.stderr

    def symbols(path: Path, which: str) -> set[str]:
        said = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True)
        return {line.split()[-1] for line in said.stdout.splitlines()}

    needed = {s for s in symbols(library, "--undefined-only") if "torch" in s}
    given = set().union(*(symbols(path, "--defined-only") for path in lib.glob("lib*.so")))
    assert needed and needed - given <= {"aoti_torch_get_current_cuda_stream"}
