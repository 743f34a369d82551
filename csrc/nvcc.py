"""How csrc/cuda is compiled: one recipe for setup.py, ``make gpu`` and the tests. Torch-free."""

from pathlib import Path

CUDA = Path(__file__).resolve().parent / "cuda"
MODULE = "pelt_fast._C_cuda"  # what the build writes, and what ops/common/native_cuda.py looks for
TORCH_TARGET = "0x020a000000000000"  # 2.10: the stable ABI the ops are written against
KERNELS = {  # source: what it is compiled for; a GPU newer than these compiles the PTX of sm_80
    "rank_backward": ("80", "90a"),
    "tail_gemm": ("90a",),
}
PORTABLE = "80"


def targets(architectures: tuple[str, ...]) -> list[str]:
    """nvcc's flags for machine code of ``architectures``."""
    return [
        f"-gencode=arch=compute_{a},code={f'[sm_{a},compute_{a}]' if a == PORTABLE else f'sm_{a}'}"
        for a in architectures
    ]


def compile_command(nvcc: str, source: Path, to: Path, *flags: str) -> list[str]:
    """One source to one object file; a kernel for all it is written for."""
    return [nvcc, "-c", "-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra",
            *targets(KERNELS.get(source.stem, ())), *flags, str(source), "-o", str(to)]  # fmt: skip


def kernels() -> list[Path]:
    """The sources that need no torch."""
    return [CUDA / f"{name}.cu" for name in KERNELS]


def objects(nvcc: str, sources: list[Path], folder: Path, *flags: str) -> list[tuple]:
    """(object file, command that makes it) of each source."""
    files = [folder / f"{source.stem}.o" for source in sources]
    return [(to, compile_command(nvcc, source, to, *flags)) for source, to in zip(sources, files)]


def library(
    nvcc: str, to: Path, folder: Path, include: list[str], torch_lib: Path
) -> list[list[str]]:
    """The commands that make ``_C_cuda``: its objects in ``folder``, linked to ``to``."""
    system = [flag for path in include for flag in ("-isystem", path)]
    flags = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *system]
    parts = objects(nvcc, [*kernels(), CUDA / "ops.cpp"], folder, *flags)
    names = ("c10", "torch", "torch_cpu", "torch_cuda")
    libraries = [f"-l{name}" for name in names if (torch_lib / f"lib{name}.so").exists()]
    link = [nvcc, "-shared", "-cudart=static", *(str(part) for part, _ in parts), "-o", str(to),
            f"-L{torch_lib}", *libraries]  # fmt: skip
    return [*(command for _, command in parts), link]
