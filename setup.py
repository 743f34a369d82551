"""Packages are listed by hand; the native half is built where that is possible.

``pelt_fast/kernels`` is a link to ``kernels/``, which has no ``__init__.py``: it would hide Hugging
Face's package of that name.

``pelt_fast._C`` (csrc/) needs a C++17 compiler and torch at build time: install with
``--no-build-isolation``. Where one is missing, or ``PELT_FAST_CPP=0``, one sentence says so and the
package is pure Python. ``PELT_FAST_DEBUG=1`` builds without optimisation, ``PELT_FAST_SANITIZE=1``
with the address and undefined-behaviour sanitizers (``make asan``).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

PACKAGES = [
    "pelt_fast",
    "pelt_fast.cli",
    "pelt_fast.fused",
    "pelt_fast.kernels",
    "pelt_fast.models",
    "pelt_fast.modules",
    "pelt_fast.ops",
    "pelt_fast.plans",
    "pelt_fast.reference",
    "pelt_fast.tasks",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
TORCH_TARGET = "0x020a000000000000"  # 2.10: the stable ABI the ops are written against


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


def native() -> dict:
    """What setup() is told to build: nothing where that is not possible."""
    reason = why_pure_python()
    if reason is not None:
        print(f"pelt_fast: pure-Python install, the C++ ops are not built: {reason}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class Optional(BuildExtension):
        """A compiler that fails leaves a pure-Python install, and says so."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                print(f"pelt_fast: pure-Python install, building the C++ ops failed: {error}")

    level = ["-O0", "-g"] if os.environ.get("PELT_FAST_DEBUG") == "1" else ["-O3"]
    if os.environ.get("PELT_FAST_SANITIZE") == "1":
        level = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZERS]
    system = [
        flag for path in include_paths() for flag in ("-isystem", path)
    ]  # no warnings of torch's
    flags = ["-std=c++17", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi",
             f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *level]  # fmt: skip
    sources = ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    headers = ["csrc/check.h", *sorted(map(str, Path("csrc/cpu").glob("*.h")))]
    module = CppExtension(
        "pelt_fast._C", sources, depends=headers, extra_compile_args=[*flags, *system],
        extra_link_args=SANITIZERS if SANITIZERS[0] in level else [], optional=True,
    )  # fmt: skip
    return dict(ext_modules=[module], cmdclass={"build_ext": Optional})


setup(packages=PACKAGES, **native())
