"""Count the tiles of kernels/tiles.py and others for the same rows: ``python -m tests.ptx.tiles``.

Each launch of the tuner's cases is made at its full size, compiled for the target, and one of its
programs is executed by the machine (``sampled.py``). The counts go to counted_tiles.json after each
row; what is there already is not counted again. The orders that follow from them at the peaks of a
GPU (``peaks.py``) go to docs/codegen.md and, as the reasons of the rows, to kernels/tiles.py
(``tile_words.py``). They order tiles where nothing was measured: ``make gpu PART=tune`` decides.
"""

import argparse
import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple

import torch

from pelt_fast.kernels.tile import Tile

from . import tile_times, tile_words
from .peaks import PEAKS
from .sampled import assembled, sample, work
from .tile_rows import CASES, Place, places, tiles
from .tile_words import Counted, read, write


def sizes(place: Place):
    """The shapes of the targets; fewer programs where one walks through many tiles, and shorter loops in fp32."""
    from benchmarks.gpu.kernel_case import Sizes

    few = {"tail_gemm_descriptor": dict(m=2048)}.get(place.table, {})
    short = dict(k=1024) if place.row.bits == 32 else {}
    size = place.size
    named = dict(dim=size) if place.table.startswith("prefix") else dict(ranks=(size,))
    return Sizes(**few, **short, **named)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Inside, the tensors of cases are memory that nobody touched: one program reads little of it."""
    from benchmarks.gpu import kernel_cases

    def empty(device, dtype):
        return lambda *shape, of=dtype: torch.empty(*shape, dtype=of)

    kept, kernel_cases.drawn = kernel_cases.drawn, empty
    try:
        yield
    finally:
        kernel_cases.drawn = kept


class Sampling:
    """The launches that are made inside, as work."""

    def __init__(self, target: str):
        self.target, self.works, self.machine_code = target, [], (0, 0)

    def __enter__(self):
        from pelt_fast.kernels import config, tail_gemm

        from .triton_launch import on_the_machine

        self.kept = config.architecture, config.processors
        config.architecture = lambda device: self.target
        config.processors = tail_gemm.processors = lambda device: PEAKS[self.target].processors
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(on_the_machine(
            self.target, watch=self._watch, edit=self._assemble,
            execute=lambda launch, mode, counted: sample(launch),
        ))  # fmt: skip
        return self

    def __exit__(self, *error):
        from pelt_fast.kernels import config, tail_gemm

        self.stack.close()
        config.architecture, config.processors = self.kept
        tail_gemm.processors = config.processors

    def _assemble(self, text: str) -> str:
        self.machine_code = assembled(text)
        if self.machine_code[1]:
            raise ValueError(f"spills {self.machine_code[1]} bytes a thread")
        return text

    def _watch(self, launch, counts) -> None:
        self.works.append(work(launch, counts, *self.machine_code))


def count(place: Place, known: Counted | None) -> Counted:
    """The counts of a row: those that are known, and what is missing."""
    from benchmarks.gpu.candidates import cases_of
    from pelt_fast.kernels import config

    dtype = torch.bfloat16 if place.row.bits == 16 else torch.float32
    with untouched(), Sampling(place.target) as sampling:
        cases = cases_of(place.table, torch.device("cpu"), sizes(place), dtype)
        case = next(c for c in cases if CASES.get(place.table, "") in f"{c.kernel} {c.name}")
        name = f"{case.kernel} {case.name}" + (
            f" D={place.size}" if place.table.startswith("prefix") else ""
        )
        found = Counted(place.key, name, case.bytes, case.flops, [])
        known = known if known and known.case == name else None
        others = [Tile(**entry["tile"]) for entry in known.entries] if known else []
        for tile in dict.fromkeys([*tiles(place), *others]):
            sampling.works.clear()
            entry = known.entry(tile) if known else None
            if entry is None:
                entry = {"tile": {n: size for n, size in asdict(tile).items() if size}}
                try:
                    with config.forced(place.table, tile):
                        case.ours()
                    entry["works"] = [list(astuple(each)) for each in sampling.works]
                except Exception as error:  # no room, spills, a race: not a candidate
                    entry["left_out"] = said(error)
            found.entries.append(entry)
    return found


def said(error: Exception) -> str:
    """The first line of an error, without the places of files."""
    return re.sub(r"\S*/", "", f"{error}".strip().splitlines()[0])[:120]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.tiles", description=__doc__)
    parser.add_argument("--only", default="", help="a table, or the start of its name")
    parser.add_argument("--target", choices=list(PEAKS))
    parser.add_argument("--again", action="store_true", help="count what is known too")
    parser.add_argument("--order", action="store_true", help="only print the orders that are known")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is imported
    torch.set_num_threads(1)
    here = list(places())
    found = {key: counted for key, counted in read().items() if list(key) in [p.key for p in here]}
    chosen = [p for p in here if p.table.startswith(options.only)
              and options.target in (None, p.target)]  # fmt: skip
    for place in chosen:
        key, started = tuple(place.key), time.perf_counter()
        if not options.order:
            found[key] = count(place, None if options.again else found.get(key))
            write(found)
        if key in found:
            print(tile_words.order(place, found[key]))
            print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if not options.order:
        tile_words.page(found, tile_times.section(found))
        tile_words.into_tiles(found)


if __name__ == "__main__":
    main()
