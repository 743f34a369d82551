"""Measure candidate tiles of every kernel, the largest rank at which a kernel beats the library,
the LoRA plans and the context kernels. Write the fastest to kernels/tuned.py (and next to the
result file), so that one run puts them in use.

All candidates are compiled first, in many processes. Then each is checked and timed on every case
that reads its row. The best candidate has the smallest sum of ratios to the present time over
those cases. It replaces the present row if it is faster by 2 % or more. The same rule holds for
plans and library kernels.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY, table
from pelt_fast.kernels import config
from pelt_fast.kernels.tile import HALF, Tile
from pelt_fast.kernels.tiles import MAX_RANK

from . import fused
from .candidates import (
    FAMILY,
    candidates,
    cases_of,
    in_order,
    limit_of,
    name_of,
    size_of,
    variants,
)
from .compiling import Compilation
from .kernel_case import KernelCase, Sizes, same_mask
from .kernels import off
from .layers import Forced, Layer, Layers, gradient_of, layers, step
from .measure import graph_milliseconds, milliseconds
from .measured import Tables
from .record import Record

TUNED = REPOSITORY / "kernels" / "tuned.py"
GAIN = 0.98
COMPILING = 0.4  # of the time
KEPT = 0.15  # of the time, for what follows the tiles
HOPELESS = 2.0  # times the present row: no other number of programs is tried
WHOLE = ("tail", "widened")  # the footprint of these tiles does not grow with the rank


@dataclass(frozen=True)
class Timed:
    """One case: the milliseconds of the present row and of each candidate."""

    case: str
    size: int
    present: float
    times: dict[Tile, float]


class Tuning:
    """One run: where it measures, what it has measured."""

    def __init__(self, record: Record, device: torch.device, sizes: Sizes, dtype):
        self.record, self.device, self.sizes, self.dtype = record, device, sizes, dtype
        self.arch = config.architecture(device)
        on_gpu = device.type == "cuda"
        self.name = torch.cuda.get_device_name(device) if on_gpu else device.type
        self.seed = torch.tensor([7, 11], device=device)
        self.tables, self.rows = Tables(), []
        self.compilation: Compilation | None = None

    def usable(self, case: KernelCase, tile: Tile | None) -> bool:
        """Whether a candidate was compiled and ran."""
        return self.compilation is None or self.compilation.usable(name_of(case, tile))

    def has_time(self) -> bool:
        """Whether there is time for one more candidate, and for the steps after the tiles."""
        seconds = self.record.seconds
        return seconds is None or self.record.seconds_left > KEPT * seconds

    def synchronize(self) -> None:
        """Wait; RuntimeError where the GPU's context is lost."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_case(self, kernel: str, case: KernelCase) -> Timed | None:
        """Time every candidate on one case; None where the time is over."""
        tiles = [tile for tile in candidates(kernel) if self.usable(case, tile)]
        missing = len(candidates(kernel)) - len(tiles)
        if missing:
            self.record.leave(f"{kernel}, {case.kernel} {case.name}: {missing} tiles not compiled")
        present = milliseconds(case.ours, self.device)[0]
        want, found = tuple(case.plain(same_mask(self.seed))), {}
        for variants_ in (variants(kernel, tile) for tile in tiles):
            for tile in variants_ if self.has_time() else ():
                found[tile] = self.time_tile(kernel, case, tile, want)
                if isinstance(found[tile], str) or found[tile] > HOPELESS * present:
                    break
        name = f"{case.kernel} {case.name}"
        # a GPU that waited has low clocks
        present = min(present, milliseconds(case.ours, self.device)[0])
        tried = [[{k: v for k, v in asdict(t).items() if v}, told] for t, told in found.items()]
        self.record.add(kernel=kernel, case=name, milliseconds=present, tried=tried)
        if not self.has_time():
            return None
        times = {tile: told for tile, told in found.items() if not isinstance(told, str)}
        return Timed(name, size_of(case, self.sizes), present, times)

    def time_tile(self, kernel: str, case: KernelCase, tile: Tile, want: tuple) -> float | str:
        """Milliseconds of a case under a tile, or the error."""
        try:
            with config.forced(kernel, tile):
                case.ours()  # the second launch is judged: the first one is Triton's own
                return off(case.ours(), want) or milliseconds(case.ours, self.device)[0]
        except Exception as error:  # out of shared memory, registers: not a candidate here
            self.synchronize()
            return said(error)

    def tune_table(self, kernel: str) -> None:
        """Time every case of a table, and put the rows: the winners, or the present ones."""
        groups: dict[int, list[Timed | None]] = {}
        for case in cases_of(kernel, self.device, self.sizes, self.dtype):
            limit, timed = limit_of(kernel, size_of(case, self.sizes), self.device), None
            try:
                timed = self.time_case(kernel, case) if self.has_time() else None
            except Exception as error:
                self.record.add(
                    kernel=kernel, case=f"{case.kernel} {case.name}", failed=said(error)
                )
                self.synchronize()
            groups.setdefault(limit, []).append(timed)
        self.put_winners(kernel, groups)

    def put_winners(self, kernel: str, groups: dict[int, list[Timed | None]]) -> None:
        """Put the rows of a table; ``groups``: limit of the present row -> its cases, None for one
        that was not timed."""
        new, won = {}, False
        for limit, group in groups.items():
            if None in group:
                self.record.leave(f"{kernel} up to {limit}")
            measured = [timed for timed in group if timed is not None]
            best, share = (None, 1.0) if None in group else winner(measured)
            present = config.pick(kernel, HALF, limit, self.device)
            new[limit] = present, f"stays: {self.why(measured, None)}"
            if best is not None:
                # a larger rank may not fit the shared memory
                top = limit if kernel.startswith(WHOLE) else max(t.size for t in measured)
                if top < limit:
                    new[limit] = present, f"stays above {top}: not measured"
                new[top], won = (best, self.why(measured, best)), True
            self.rows.append(
                [f"{kernel} up to {limit}", str(best or "present row stays"),
                 f"{share:.2f} of the present row's time"]
            )  # fmt: skip
        if won:  # with the rows that stay, or a winner of larger sizes would serve theirs
            self.tables.set_rows(kernel, self.arch, new)

    def why(self, group: list[Timed], tile: Tile | None) -> str:
        """The cases, with the time of a tile and of the row before it."""
        cells = [
            f"{t.case} {t.present:.4f} ms" if tile is None
            else f"{t.case} {t.times[tile]:.4f} ms, {t.present:.4f} before"
            for t in group
        ]  # fmt: skip
        return f"{'; '.join(cells) or 'not measured'}, on {self.name}"

    def tune_ranks(self) -> None:
        """Up to which rank each kernel of ``config.FUSED_RANK`` beats the library."""
        ratios: dict[str, dict[int, float]] = {}
        for kernel, rank, both in fused.pairs(self.device, self.sizes, self.dtype):
            if not self.record.in_time:
                self.record.leave(f"{kernel} against the library at R={rank}")
                ratios.pop(kernel, None)
                continue
            try:
                ours, library = (milliseconds(f, self.device)[0] for f in both)
            except Exception as error:
                self.record.add(kernel=kernel, rank=rank, failed=said(error))
                self.synchronize()
                continue
            self.record.add(kernel=kernel, rank=rank, milliseconds=ours, library=library)
            ratios.setdefault(kernel, {})[rank] = ours / library
        limits = self.tables["FUSED_RANK"].setdefault(self.arch, {})
        for kernel, known in ratios.items():
            if min(known) == min(fused.RANKS):  # else nothing is known of small ranks
                limits[kernel] = fused.limit(known, config.FUSED_RANK[kernel])
                cells = ", ".join(f"R={r} {ratio:.2f}" for r, ratio in known.items())
                self.rows.append([f"{kernel} to the library", f"up to {limits[kernel]}", cells])

    def tune_layers(self) -> None:
        """The LoRA plan, the one-pass kernel and the context kernel of whole layers."""
        for layer, name, answers in time_layers(self.record, self.device):
            best = chosen(answers, self.present(name))
            cells = ", ".join(f"{answer} {taken:.3f}" for answer, taken in answers.items())
            self.rows.append([layer, best, f"{cells} ms"])
            if name == "plan":
                self.tables["PLANS"][self.arch] = (
                    (Layers().rank, best, f"{layer} on {self.name}: {cells} ms"),
                    (MAX_RANK, "accumulate", "not measured"),
                )
            else:
                self.tables[{"context": "CONTEXT", "one_pass": "ONE_PASS"}[name]][self.arch] = best

    def present(self, table_name: str) -> str:
        """What a table of whole layers answers now."""
        return {
            "plan": lambda: config.lora_plan(Layers().rank, self.device),
            "context": lambda: config.context_kernel(self.device),
            "one_pass": lambda: config.one_pass_kernel(self.device),
        }[table_name]()


def chosen(answers: dict[str, float], present: str) -> str:
    """The quickest answer; the present one where that is no gain."""
    best = min(answers, key=answers.get)
    stays = present in answers and answers[best] > GAIN * answers[present]
    return present if stays else best


def winner(group: list[Timed]) -> tuple[Tile | None, float]:
    """The tile with the smallest sum of time to present time over all cases, and the mean of them;
    None where it is no gain."""
    shared = set.intersection(*(set(timed.times) for timed in group))
    score = {tile: sum(t.times[tile] / t.present for t in group) / len(group) for tile in shared}
    best = min(score, key=score.get, default=None)
    return (best, score[best]) if best is not None and score[best] <= GAIN else (None, 1.0)


def run(
    record: Record,
    device: torch.device,
    sizes: Sizes | None = None,
    dtype=torch.bfloat16,
    to: Path = TUNED,
) -> int:
    """Tune what the time allows and write it as it is found."""
    tuning, code = Tuning(record, device, sizes or Sizes(), dtype), 0
    if device.type == "cuda":
        with Compilation(record, COMPILING * min(record.seconds_left, 600)) as compilation:
            warm_layers(record, device)
        tuning.compilation = compilation
    stages = [(f"tiles of {kernel}", lambda kernel=kernel: tuning.tune_table(kernel))
              for kernel in in_order(FAMILY)]  # fmt: skip
    stages.append(("ranks", tuning.tune_ranks))
    if device.type == "cuda":
        stages.append(("layers", tuning.tune_layers))
    with tuning.tables.in_use():
        for name, stage in stages:
            try:
                stage()
                tuning.tables.write(to, record.path)
                tuning.synchronize()
            except Exception as error:
                code = 1
                record.add(stage=name, failed=said(error))
                if not alive(tuning):
                    record.leave(f"all after {name}: the GPU's context is lost")
                    break
    record.finish(**{name.lower(): value for name, value in tuning.tables.tables.items()})
    print(table(["what", "winner", "milliseconds"], tuning.rows))
    return code


def said(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:160]


def alive(tuning: Tuning) -> bool:
    """Whether the GPU still answers."""
    try:
        tuning.synchronize()
    except RuntimeError:
        return False
    return True


def compared(device, sizes: Layers | None = None) -> Iterator[tuple[Layer, list[Forced]]]:
    """The layers that decide a table, and the candidates on each."""
    for layer in layers(device, sizes or Layers()):
        forced = [p for p in layer.providers.values() if isinstance(p, Forced)]
        if forced and "p=0.1" not in layer.name and "causal" not in layer.name:
            yield layer, forced


def warm_layers(record: Record, device, sizes: Layers | None = None) -> None:
    """Compile the kernels of the layers, while the others are compiled."""
    try:
        for layer, forced in compared(device, sizes):
            x = torch.randn(*layer.shape, device=device).to(torch.bfloat16)
            dy = gradient_of(layer, x)
            for provider in forced:
                try:
                    step(layer, provider, x, dy)()
                except Exception as error:  # left out when it is timed
                    record.add(layer=layer.name, answer=provider.answer, failed=said(error))
        torch.cuda.empty_cache()
    except Exception as error:
        record.add(stage="layers, compiled", failed=said(error))


def time_layers(record: Record, device, sizes: Layers | None = None) -> Iterator[tuple]:
    """(layer, table, answer -> milliseconds as a CUDA graph) of the LoRA plans and the context
    kernels."""
    for layer, forced in compared(device, sizes):
        x = torch.randn(*layer.shape, device=device).to(torch.bfloat16)
        dy, times = gradient_of(layer, x), {}
        for provider in forced:
            if not record.in_time:
                record.leave(f"{layer.name} {provider.table} {provider.answer}")
                return
            try:
                taken = graph_milliseconds(step(layer, provider, x, dy), device)
            except Exception:  # a missing kernel is not chosen
                taken = None
            record.add(layer=layer.name, answer=provider.answer, milliseconds=taken)
            if taken is not None:
                times.setdefault(provider.table, {})[provider.answer] = taken
        for table_name, answers in times.items():
            yield layer.name, table_name, answers
