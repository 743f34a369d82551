"""Packages are listed by hand; the native half is built where that is possible.

``pelt_fast/kernels`` is a link to ``kernels/``, which has no ``__init__.py``: it would hide Hugging
Face's package of that name.

``pelt_fast._C`` (csrc/) needs a C++17 compiler and torch at build time: install with
``--no-build-isolation``. Where one is missing, or ``PELT_FAST_CPP=0``, one sentence says so and the
package is pure Python. ``PELT_FAST_DEBUG=1`` builds without optimisation, ``PELT_FAST_SANITIZE=1``
with the address and undefined-behaviour sanitizers (``make asan``).

``pelt_fast._C_cuda`` (csrc/cuda/) is built beside it where torch has CUDA and the nvcc on the path,
or under CUDA_HOME, is of the same major version; ``PELT_FAST_CUDA=0`` leaves it out, ``=1`` builds
it beside any torch (it then loads where that torch has CUDA).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
from csrc import nvcc

PACKAGES = [
    "pelt_fast",
    "pelt_fast.cli",
    "pelt_fast.compose",
    "pelt_fast.config",
    "pelt_fast.formats",
    "pelt_fast.injection",
    "pelt_fast.injection.discovery",
    "pelt_fast.integrations",
    "pelt_fast.integrations.several",
    "pelt_fast.kernels",
    "pelt_fast.layouts",
    "pelt_fast.modules",
    "pelt_fast.ops",
    "pelt_fast.ops.adapter",
    "pelt_fast.ops.beside",
    "pelt_fast.ops.common",
    "pelt_fast.ops.lora",
    "pelt_fast.ops.prefix_attention",
    "pelt_fast.ops.routed",
    "pelt_fast.ops.widened_ffn",
    "pelt_fast.tasks",
    "pelt_fast.tasks.instruct",
    "pelt_fast.testing",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def why_pure_python() -> str | None:
    """Why the native half is not built, or None."""
    if os.environ.get("PELT_FAST_CPP") == "0":
        return "PELT_FAST_CPP=0"
    if sys.platform == "win32":
        return "csrc/ is for Linux and macOS"
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))):
        return "there is no C++ compiler"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not here at build time (install it first, with --no-build-isolation)"
    return None


def toolkit() -> tuple[str | None, str | None]:
    """The nvcc that builds the CUDA ops, or why they are not built (None: nobody expects them)."""
    import torch

    asked = os.environ.get("PELT_FAST_CUDA")
    if asked == "0" or (asked != "1" and torch.version.cuda is None):
        return None, "PELT_FAST_CUDA=0" if asked == "0" else None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if program is None:
        return None, "there is no nvcc on the path or under CUDA_HOME"
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", said)
    wanted = (torch.version.cuda or "").split(".")[0]
    if asked != "1" and (found is None or found[1] != wanted):
        its = found[1] if found else "unknown"
        return None, f"nvcc is of CUDA {its}, torch of CUDA {wanted}"
    return program, None


def native() -> dict:
    """What setup() is told to build: nothing where that is not possible."""
    reason = why_pure_python()
    if reason is not None:
        print(f"pelt_fast: pure-Python install, the C++ ops are not built: {reason}")
        return {}
    from torch.utils.cpp_extension import (
        TORCH_LIB_PATH,
        BuildExtension,
        CppExtension,
        include_paths,
    )

    program, reason = toolkit()
    if reason is not None:
        print(f"pelt_fast: the CUDA C++ ops are not built: {reason}")

    class Optional(BuildExtension):
        """A compiler that fails leaves an install without what it was to build, and says so."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"pelt_fast: pure-Python install, building the C++ ops failed: {error}")

        def build_extension(self, extension) -> None:
            if extension.name != nvcc.MODULE:
                return super().build_extension(extension)
            to, folder = Path(self.get_ext_fullpath(nvcc.MODULE)), Path(self.build_temp) / "cuda"
            folder.mkdir(parents=True, exist_ok=True)
            to.parent.mkdir(parents=True, exist_ok=True)
            lib = Path(TORCH_LIB_PATH)
            for command in nvcc.library(program, to, folder, include_paths(), lib):
                ran = subprocess.run(command, capture_output=True, text=True)
                if ran.returncode:
                    said = (ran.stdout + ran.stderr)[-1000:]
                    return print(f"pelt_fast: building the CUDA C++ ops failed: {said}")

    level = ["-O0", "-g"] if os.environ.get("PELT_FAST_DEBUG") == "1" else ["-O3", "-g0"]
    if os.environ.get("PELT_FAST_SANITIZE") == "1":
        level = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS]
    system = [
        flag for path in include_paths() for flag in ("-isystem", path)
    ]  # no warnings of torch's
    vectors = ["-ffp-contract=fast", "-fno-trapping-math"]  # of a * b + c, and of x < 0 ? a : b
    flags = ["-std=c++17", *vectors, "-Wall", "-Wextra", "-Wno-psabi",
             f"-DTORCH_TARGET_VERSION={nvcc.TORCH_TARGET}", *level]  # fmt: skip
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    headers = ["csrc/check.h", "csrc/tensors.h", *sorted(map(str, Path("csrc/cpu").glob("*.h")))]
    module = CppExtension(
        "pelt_fast._C", sources, depends=headers, extra_compile_args=[*flags, *system],
        extra_link_args=SANITIZERS if SANITIZERS[0] in level else [], optional=True,
    )  # fmt: skip
    modules = [module]
    if program is not None:
        sources = sorted(map(str, Path("csrc/cuda").iterdir()))
        modules.append(Extension(nvcc.MODULE, [], depends=sources, optional=True))
    return dict(ext_modules=modules, cmdclass={"build_ext": Optional})


setup(
    packages=PACKAGES,
    package_data={"pelt_fast": ["py.typed", "tasks/*.yaml", "tasks/recipes/*.yaml"]},
    **native(),
)
