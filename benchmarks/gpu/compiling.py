"""Compile what tuning will time, in many processes at once, into Triton's cache on disk.

Each process takes every N-th case under a tile, runs it once, and writes the outcome. A case that
ended a process is not run again. ``python -m benchmarks.gpu.compiling I N UNTIL FILE``.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY
from pelt_fast.kernels import config
from pelt_fast.kernels.tile import Tile

from . import fused
from .candidates import FAMILY, candidates, cases_of, in_order, name_of, variants
from .kernel_case import KernelCase, Sizes
from .numerics import environment
from .record import Record
from .reporter import LOST

COMPILED = "compiled"
PROGRAM = ("-m", "benchmarks.gpu.compiling")
Work = Iterator[tuple[str, Callable[[], object]]]


def work(device: torch.device, sizes: Sizes, dtype=torch.bfloat16) -> Work:
    """Everything to compile, the most important first. Each case is run before the next is made."""
    for table in in_order(FAMILY):
        try:
            yield from _work_of(table, device, sizes, dtype)
        except Exception as error:  # its cases cannot be made; those of other tables can
            yield table, lambda error=error: _raise(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the processes share the memory
    for kernel, rank, (ours, _) in fused.pairs(device, sizes, dtype):
        yield f"{kernel} R={rank} without dropout", ours


def _work_of(table: str, device: torch.device, sizes: Sizes, dtype: torch.dtype) -> Work:
    for case in cases_of(table, device, sizes, dtype):
        for tile in (None, *candidates(table)):
            yield name_of(case, tile), lambda case=case, tile=tile: run_all(table, case, tile)


def _raise(error: Exception) -> None:
    raise error


def run_all(table: str, case: KernelCase, tile: Tile | None) -> None:
    """Run a case under every variant of a tile, or under the present row. The launcher makes
    kernels of their own for some sizes of a split."""
    if tile is None:
        case.ours()
        return
    for variant in variants(table, tile):
        with config.forced(table, variant):
            case.ours()


def compile_share(file: Path, share: tuple[int, int], until: float, each: Work) -> None:
    """Run every N-th of ``each`` that ``file`` does not name, up to the time ``until``."""
    known, (index, count) = outcomes([file]), share
    with file.open("a") as lines:
        for i, (name, function) in enumerate(each):
            if time.time() > until:
                return
            if i % count == index and name not in known:
                _write(lines, name, "started")
                _write(lines, name, _outcome(function))


def _write(lines, name: str, outcome: str) -> None:
    lines.write(json.dumps([name, outcome]) + "\n")
    lines.flush()


def _outcome(function: Callable[[], object]) -> str:
    """COMPILED, or why not. A lost context ends the process: every later case would fail."""
    try:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, registers: not a candidate here
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            os._exit(LOST)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:160]
    return COMPILED


def outcomes(files: list[Path]) -> dict[str, str]:
    """Name -> its last outcome, over all processes."""
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return dict(json.loads(line) for line in lines if line.endswith("]"))


class Compilation:
    """The processes, from the start of the ``with`` to its end; ``outcomes`` after it."""

    def __init__(self, record: Record, seconds: float, count: int | None = None):
        self.record, self.until = record, time.time() + seconds
        self.count = count or max(1, (os.cpu_count() or 2) - 1)
        self.outcomes: dict[str, str] = {}
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / f"{i}.jsonl" for i in range(self.count)]

    def __enter__(self) -> "Compilation":
        self.pool = ThreadPoolExecutor(self.count)
        self.shares: list[Future] = [self.pool.submit(self._share, i) for i in range(self.count)]
        return self

    def __exit__(self, *raised) -> None:
        said = [share.result() for share in self.shares]
        self.pool.shutdown()
        self.outcomes = outcomes(self.files)
        failed = {n: o for n, o in self.outcomes.items() if o != COMPILED}
        self.record.add(
            compiled=len(self.outcomes) - len(failed), processes=self.count, not_compiled=failed,
            said=[text for text in said if text][:3],
        )  # fmt: skip
        self.folder.cleanup()

    def _share(self, index: int) -> str:
        """Run one share; restart it after a case that ended its process. Return the last output."""
        file, before, said = self.files[index], -1, ""
        options = (str(index), str(self.count), str(self.until), str(file))
        while time.time() < self.until and len(outcomes([file])) > before:
            before = len(outcomes([file]))
            try:
                ran = subprocess.run(
                    [sys.executable, *PROGRAM, *options], cwd=REPOSITORY, env=environment(),
                    capture_output=True, text=True, timeout=max(1.0, self.until + 5 - time.time()),
                )  # fmt: skip
            except (subprocess.TimeoutExpired, OSError) as error:
                return str(error)[:200]
            if ran.returncode == 0:
                return ""
            said = f"ended with {ran.returncode}: {ran.stderr[-500:]}"
        return said

    def usable(self, name: str) -> bool:
        """Whether it compiled and ran; everything where no process wrote anything."""
        return not self.outcomes or self.outcomes.get(name) == COMPILED


def main() -> None:
    """Compile one share."""
    index, count, until, file = sys.argv[1:]
    device = torch.device("cuda", torch.cuda.current_device())
    share = int(index), int(count)
    compile_share(Path(file), share, float(until), work(device, Sizes()))


if __name__ == "__main__":
    main()
