"""Where the CUDA C++ ops are looked for, and what csrc/ takes from torch: needs no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pelt_fast
from benchmarks.gpu import driver
from csrc import nvcc
from pelt_fast.ops.common import native_cuda

CSRC = nvcc.CUDA.parent
# looked up in the headers of torch 2.10.0, the oldest that pelt_fast runs with
IN_TORCH_2_10 = {
    "STABLE_TORCH_LIBRARY_FRAGMENT", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX",
    "TORCH_TARGET_VERSION", "aoti_torch_get_current_cuda_stream", "torch::headeronly::BFloat16",
    "torch::headeronly::Half", "torch::headeronly::ScalarType", "torch::stable::Tensor",
    "torch::stable::new_empty", "torch::stable::parallel_for",
    "torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/library.h",
    "torch/csrc/stable/ops.h", "torch/csrc/stable/tensor.h", "torch/headeronly/core/ScalarType.h",
    "torch/headeronly/util/BFloat16.h", "torch/headeronly/util/Exception.h",
    "torch/headeronly/util/Half.h",
}  # fmt: skip


def reason() -> str:
    """Why the ops are missing, asked anew."""
    return native_cuda.why_missing.__wrapped__() or ""


def test_the_ops_are_looked_for_where_the_build_writes_them():
    assert native_cuda.MODULE == nvcc.MODULE
    assert driver.OPS.parent.samefile(Path(pelt_fast.__file__).parent)


@pytest.mark.parametrize("name", ["_C_cuda.so", "_C_cuda.abi3.so"])
def test_a_library_in_the_package_is_found(name, tmp_path, monkeypatch):
    monkeypatch.setattr(pelt_fast, "__path__", [str(tmp_path)])
    assert "installed without" in reason()
    (tmp_path / name).touch()
    monkeypatch.setattr(native_cuda.env, "has_gpu", lambda: False)
    assert reason() == "torch sees no GPU"
    monkeypatch.setattr(native_cuda.env, "has_gpu", lambda: True)
    assert "they do not load" in reason() and str(tmp_path) in reason()  # the file is empty


def test_csrc_takes_nothing_that_torch_2_10_lacks():
    used = set()
    for path in CSRC.rglob("*"):
        if path.suffix in (".cpp", ".cu", ".cuh", ".h"):
            code = re.sub(r"//.*", "", path.read_text())
            used |= set(re.findall(r"\b(?:STABLE|STD)_\w+|\bTORCH_\w+|\baoti_\w+(?=\()", code))
            used |= set(re.findall(r"\btorch::\w+::\w+|\btorch/[\w/]+\.h", code))
    assert used == IN_TORCH_2_10


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_bindings_compile_with_the_pybind11_of_torch_2_10(tmp_path):
    """That one stops where TORCH_TARGET_VERSION is defined; the later ones do not."""
    header = tmp_path / "pybind11" / "pybind11.h"
    header.parent.mkdir()
    header.write_text("#ifdef TORCH_TARGET_VERSION\n#error as in torch 2.10\n#endif\n")
    command = ["c++", "-E", f"-I{tmp_path}", "-DTORCH_TARGET_VERSION=1", CSRC / "bindings.cpp"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
