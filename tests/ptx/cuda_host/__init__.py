"""The launchers of csrc/cuda as they are, on a stand-in for the CUDA runtime: no driver, no GPU.

``compiled`` makes one library of a source's host code and of ``runtime.cpp``, and keeps the PTX of
the same run of nvcc. ``Host`` calls a launcher and records what it launches: the grid, the clusters,
the shared memory and the parameters, tensor maps in them, are the code's own.
"""

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.toolkit import found
from csrc import nvcc

from ..errors import MachineError
from ..global_memory import GlobalMemory
from ..launch import SHARED
from ..machine import Launch
from ..parser import parse
from ..tensor_maps import TensorMap

HERE = Path(__file__).parent
NVCC = found("nvcc")
MISSING = "nvcc is not on this machine: csrc/cuda is neither compiled nor executed"
INVALID_VALUE, INVALID_CONFIGURATION, NOT_SUPPORTED = 1, 9, 801  # of cudaError_t
_LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p))  # fmt: skip
_CHECKED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_parse = functools.lru_cache(maxsize=64)(parse)


@dataclass(frozen=True)
class Compiled:
    """A library of host code, and the PTX of each target, such as ``sm_90a``."""

    library: Path
    texts: tuple[tuple[str, str], ...]

    def text(self, target: str) -> str:
        return dict(self.texts)[target]


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")


@functools.cache
def scratch() -> Path:
    """A folder for what is compiled, removed at the end of the process."""
    folder = tempfile.mkdtemp(prefix="pelt-fast-cuda-host-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def _stand_in() -> list[str]:
    """The objects of the stand-in."""
    objects = []
    for name in ("runtime", "entries"):
        to = scratch() / f"{name}.o"
        _run([NVCC, "-c", "-O2", "-std=c++17", "-Xcompiler=-fPIC", f"-I{nvcc.CUDA}",
              str(HERE / f"{name}.cpp"), "-o", str(to)])  # fmt: skip
        objects.append(str(to))
    return objects


def compiled(source: Path, folder: Path, targets: tuple[str, ...] | None = None) -> Compiled:
    """Compile one source of csrc/cuda, or a changed copy of one, without machine code.

    Args:
        source: its name is that of a launcher.
        folder: where the files go.
        targets: architectures, such as "90a"; without them those that ``csrc/nvcc.py`` has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = targets or nvcc.KERNELS[source.stem]
    virtual = [f"-gencode=arch=compute_{t},code=compute_{t}" for t in targets]
    to = folder / f"{source.stem}.o"
    own = "-Xcompiler=-fno-gnu-unique"  # statics of inline functions, not those of another library
    keep = "-lineinfo", "--keep", "--keep-dir", str(folder)
    command = nvcc.compile_command(NVCC, source, to, own, *keep)
    real = nvcc.targets(nvcc.KERNELS[source.stem])
    _run([*(word for word in command if word not in real), *virtual])
    library = folder / f"lib{source.stem}.so"
    _run([NVCC, "-shared", "-cudart=none", "-Xlinker=-Bsymbolic,-z,defs", str(to), *_stand_in(),
          "-o", str(library)])  # fmt: skip
    texts = []
    for target in targets:  # nvcc leaves the architecture out where there is one
        kept = folder / f"{source.stem}.compute_{target}.ptx"
        kept = kept if kept.exists() else folder / f"{source.stem}.ptx"
        texts.append((f"sm_{target}", kept.read_text()))
    return Compiled(library, tuple(texts))


@functools.cache
def original(name: str) -> Compiled:
    """``csrc/cuda/name.cu`` as it is."""
    return compiled(nvcc.CUDA / f"{name}.cu", scratch() / name)


class Host:
    """The launchers of a library, on a device of ``target``; ``major`` is another generation's."""

    def __init__(self, code: Compiled, target: str, major: int | None = None):
        self.text, self.target = code.text(target), target
        self.major = major or int(target[3])
        self.library = ctypes.CDLL(str(code.library))
        self._callbacks = _LAUNCHED(self._launched), _CHECKED(self._checked)

    def call(self, function: str, *arguments, memory: GlobalMemory) -> tuple[int, list[Launch]]:
        """(error, launches in their order) of a launcher; 0 is cudaSuccess."""
        self.launches: list[Launch] = []
        self.memory, self.error = memory, None
        self.library.stand_in(self.major, SHARED[self.target], *self._callbacks)
        error = getattr(self.library, function)(*arguments)
        if self.error is not None:  # an exception cannot pass through C
            raise self.error
        return error, self.launches

    def _kept(self, work: Callable):
        """What ``work`` returns, or None where it fails; the first failure is kept."""
        try:
            return work()
        except Exception as error:
            self.error = self.error or error
            return None

    def _launched(self, name: bytes, sizes, shared: int, arguments) -> None:
        self._kept(lambda: self._record(name.decode(), list(sizes[:9]), shared, arguments))

    def _record(self, name: str, sizes: list[int], shared: int, arguments) -> None:
        entry = _parse(self.text, name)
        parameters = bytearray(entry.parameter_bytes)
        for n, parameter in enumerate(entry.parameters):
            data = ctypes.string_at(arguments[n], parameter.size)
            parameters[parameter.offset : parameter.offset + parameter.size] = data
        block, cluster = sizes[3:6], sizes[6:9]
        if block[1:] != [1, 1] or cluster[1:] != [1, 1]:
            raise MachineError(f"{name}: blocks and clusters of more than one dimension")
        grid = tuple(sizes[:3])
        launch = Launch(entry, grid, block[0], bytes(parameters), shared, cluster[0], self.memory)
        self.launches.append(launch)

    def _checked(self, packed: int) -> int:
        return self._kept(lambda: self._is_map(ctypes.string_at(packed, 128)))

    def _is_map(self, packed: bytes) -> bool:
        """Whether the driver would make this tensor map."""
        try:
            TensorMap.unpack(packed)
        except MachineError:
            return False
        return True
