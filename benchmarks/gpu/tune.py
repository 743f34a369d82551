"""Measure candidate tiles of every kernel, the LoRA plans and the context kernels; write the rows
that win to kernels/tuned.py (and next to the result file), so that one run puts them in use.

A candidate is checked before it is timed. It wins when it is faster than the present row by 2 % or
more.
"""

import contextlib
import itertools
import os
import pprint
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY, table
from pelt_fast.kernels import config, tuned
from pelt_fast.kernels.tiles import HALF, MAX_RANK, TABLES, Tile

from .kernel_cases import KernelCase, Sizes, cases
from .kernels import wrong
from .layers import Forced, Layers, layers, step
from .measure import milliseconds
from .record import Record

TUNED = REPOSITORY / "kernels" / "tuned.py"
GAIN = 0.98


def candidates(kernel: str) -> list[Tile]:
    """The tiles that are tried."""

    def grid(**fields) -> list[Tile]:
        return [Tile(**dict(zip(fields, values))) for values in itertools.product(*fields.values())]

    common = dict(num_warps=(4, 8), num_stages=(2, 3, 4))
    if kernel.startswith("rank_down"):
        return grid(block_m=(64, 128), block_k=(64, 128, 256), block_r=(64,), **common)
    if kernel == "norm":
        return grid(block_m=(16, 32, 64), block_k=(64, 128, 256), block_r=(64,), **common)
    if kernel == "rank_up":
        shapes = dict(block_m=(32, 64, 128), block_n=(128, 256), block_r=(64,))
        return grid(**shapes, num_warps=(4, 8), num_stages=(2,))
    if kernel == "rank_up_bwd":
        return grid(block_m=(64, 128), block_n=(64, 128, 256), **common)
    if kernel == "adapter":
        shapes = dict(block_m=(32, 64, 128), block_n=(64, 128), block_k=(64, 128))
        return grid(**shapes, num_warps=(4, 8), num_stages=(2, 3))
    if kernel == "widened_ffn":
        return grid(block_m=(1, 2, 4, 8), block_n=(512, 1024, 2048), num_warps=(4, 8))
    if kernel in ("prefix", "prefix_bwd"):
        shapes = dict(block_m=(32, 64, 128), block_n=(32, 64))
        return grid(**shapes, num_warps=(4, 8), num_stages=(1, 2))
    blocks = dict(block_m=(128,), block_n=(128, 256), block_k=(32, 64), block_r=(32,))
    return grid(**blocks, num_warps=(4, 8), num_stages=(3, 4))


def table_of(case: KernelCase) -> str | None:
    """The name of the table a case reads, or None."""
    if case.kernel.startswith("widened"):
        return "widened_ffn"
    if case.kernel == "tail_gemm":
        if "descriptors" in case.name:
            return "tail_gemm_descriptor"
        return "tail_gemm_masked" if "p=" in case.name else "tail_gemm"
    return case.kernel if case.kernel in TABLES else None


def size_of(case: KernelCase, sizes: Sizes) -> int:
    """The size that the table is looked up by: the rank, or the head dim."""
    if case.kernel.startswith("prefix"):
        return sizes.dim
    return int(case.name.split("R=")[1].split()[0]) if "R=" in case.name else 512


def limit_of(kernel: str, size: int, device: torch.device) -> int:
    """The largest size the winner is used for: the limit of the row that it replaces."""
    rows = [r for a in (config.architecture(device), "any") for r in config.rows(kernel, a)]
    return min((r.limit for r in rows if r.bits == HALF and size <= r.limit), default=size)


def tune_kernel(record, case, kernel, device, seed) -> tuple[Tile, float, float] | None:
    """Winner, its milliseconds and those of the present row; None when nothing wins."""
    present, *_ = milliseconds(case.ours, device)
    best, shortest = None, present
    for tile in candidates(kernel):
        if not record.in_time:
            record.leave(f"{kernel} {case.name} from {tile}")
            break
        with config.forced(kernel, tile):
            try:
                if wrong(case, seed) is not None:
                    continue
                taken, *_ = milliseconds(case.ours, device)
            except Exception as error:  # out of shared memory, registers: not a candidate here
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                record.add(kernel=kernel, case=case.name, tile=asdict(tile), failed=reason)
                continue
        record.add(kernel=kernel, case=case.name, tile=asdict(tile), milliseconds=taken)
        if taken < shortest:
            best, shortest = tile, taken
    if best is None or shortest > GAIN * present:
        return None
    return best, shortest, present


def run(
    record: Record,
    device: torch.device,
    sizes: Sizes | None = None,
    dtype=torch.bfloat16,
    to: Path = TUNED,
) -> int:
    """Tune what the time allows and write the rows that win."""
    sizes, arch = sizes or Sizes(), config.architecture(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    seed, done, rows = torch.tensor([7, 11], device=device), set(), []
    tiles: dict = {kernel: {a: tuple(r) for a, r in t.items()} for kernel, t in tuned.TILES.items()}
    plans = dict(tuned.PLANS)
    kernels = {"context": dict(tuned.CONTEXT), "one_pass": dict(tuned.ONE_PASS)}
    if device.type == "cuda":
        for layer, forced, times in tune_layers(record, device):
            best = min(times, key=times.get)
            rows.append([layer, best, f"{times[best]:.3f}", ""])
            if forced == "plan":
                why = f"{layer} on {name}: {times[best]:.3f} ms"
                plans[arch] = (
                    (Layers().rank, best, why),
                    (MAX_RANK, "accumulate", "not measured"),
                )
            else:
                kernels[forced][arch] = best
            write(tiles, plans, kernels, record.path, to)
    for case in cases(device, sizes, dtype):
        kernel = table_of(case)
        key = (kernel, size_of(case, sizes)) if kernel else None
        if kernel is None or key in done:
            continue
        done.add(key)
        if not record.in_time:
            record.leave(f"{kernel} {case.name}")
            continue
        won = tune_kernel(record, case, kernel, device, seed)
        if won is None:
            rows.append([f"{kernel} {case.name}", "present row stays", "", ""])
            continue
        tile, taken, present = won
        rows.append([f"{kernel} {case.name}", str(tile), f"{taken:.3f}", f"{present:.3f}"])
        limit = limit_of(kernel, key[1], device)
        why = f"{case.name} on {name}: {taken:.3f} ms, {present:.3f} before"
        old = [row for row in tiles.get(kernel, {}).get(arch, ()) if row[:2] != (HALF, limit)]
        merged = sorted([*old, (HALF, limit, asdict(tile), why)], key=lambda row: row[:2])
        tiles.setdefault(kernel, {})[arch] = tuple(merged)
        write(tiles, plans, kernels, record.path, to)
    record.finish(tiles=tiles, plans=plans, **kernels)
    print(table(["case", "winner", "ms", "before"], rows))
    return 0


def tune_layers(record: Record, device, sizes: Layers | None = None) -> Iterator[tuple]:
    """(layer, table, answer -> milliseconds) of the LoRA plans and the context kernels."""
    for layer in layers(device, sizes or Layers()):
        forced = [p for p in layer.providers.values() if isinstance(p, Forced)]
        if not forced or "p=0.1" in layer.name or "causal" in layer.name:
            continue
        x = torch.randn(*layer.shape, device=device).to(torch.bfloat16)
        dy, times = torch.randn_like(layer.floor(x)), {}
        for provider in forced:
            with contextlib.suppress(Exception):  # a kernel that is not there is not chosen
                taken, *_ = milliseconds(step(layer, provider, x, dy), device)
                times.setdefault(provider.table, {})[provider.answer] = taken
                record.add(layer=layer.name, answer=provider.answer, milliseconds=taken)
        for table_name, answers in times.items():
            yield layer.name, table_name, answers


def write(tiles: dict, plans: dict, kernels: dict, beside: Path, to: Path = TUNED) -> None:
    """Rewrite kernels/tuned.py, and write a copy next to the result file."""
    head = tuned.__doc__.replace(" Empty until a GPU has run it.", "")
    shown = {"TILES": tiles, "PLANS": plans} | {k.upper(): kernels[k] for k in kernels}
    types = {"TILES": "dict[str, dict[str, tuple]]", "PLANS": "dict[str, tuple]",
             "CONTEXT": "dict[str, str]", "ONE_PASS": "dict[str, str]"}  # fmt: skip
    body = "\n".join(
        f"{name}: {types[name]} = {pprint.pformat(value, width=96, sort_dicts=False)}"
        for name, value in shown.items()
    )
    text = f'"""{head}"""\n\n# fmt: off\n{body}\n# fmt: on\n'
    for path in (to, beside.with_suffix(".tuned.py")):
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        os.replace(part, path)
