"""Each kernel: checked, then time, GB/s or TFLOP/s, ratio to the floor and to plain PyTorch."""

from collections.abc import Iterable

import torch
from torch import Tensor

from benchmarks.common import table

from .kernel_case import KernelCase, Sizes, same_mask, torchs
from .kernel_cases import cases
from .measure import floor_milliseconds, floors, milliseconds
from .record import Record

TOLERANCE = 2e-2  # of the largest magnitude: a wrong kernel is far off; tests/numerics judge finely


def wrong(case: KernelCase, seed: Tensor) -> str | None:
    """The distance of ours from plain PyTorch with the same mask if it is too large, else None."""
    case.ours()  # the second launch is judged: the first one is Triton's own
    return off(case.ours(), case.plain(same_mask(seed)))


def off(outputs: Iterable[Tensor], wanted: Iterable[Tensor]) -> str | None:
    """The first output that is too far from the expected one, or None."""
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        size = want.float().abs().max().clamp_min(1e-6)
        error = ((got.float() - want.float()).abs().max() / size).item()
        if not error <= TOLERANCE:
            return f"output {i} is off by {error:.1e} of its largest magnitude"
    return None


def compiled(case: KernelCase, device: torch.device) -> float | str:
    """Milliseconds of torch.compile of the plain expression, or the reason for no time."""
    if device.type != "cuda":
        return "on a GPU only"
    try:
        torch._dynamo.reset()
        function = torch.compile(lambda: case.plain(torchs), dynamic=False)
        return milliseconds(function, device)[0]
    except Exception as error:  # a peer that fails is a result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def run(
    record: Record, device: torch.device, sizes: Sizes | None = None, dtype=torch.bfloat16
) -> int:
    """Measure every case that fits the time; 1 when one is wrong."""
    small = sizes is not None
    best = floors(device, 1 << 20, 256) if small else floors(device)
    record.add(floors=best)
    seed, rows, failures = torch.tensor([7, 11], device=device), {}, 0
    for case in cases(device, sizes or Sizes(), dtype):
        name = f"{case.kernel} {case.name}"
        if not record.in_time:
            record.leave(name)
            continue
        found = wrong(case, seed)
        if found is not None:
            failures += 1
            record.add(name=name, wrong=found)
            rows[name] = ["WRONG", found, "", "", ""]
            continue
        ours, low, high = milliseconds(case.ours, device)
        eager = milliseconds(lambda case=case: case.plain(torchs), device)[0]
        floor = floor_milliseconds(case.bytes, case.flops, best)
        record.add(
            name=name, milliseconds=ours, low=low, high=high, floor=floor, ratio=ours / floor,
            gb_s=case.bytes / ours / 1e6, tflop_s=case.flops / ours / 1e9, eager=eager,
        )  # fmt: skip
        rows[name] = [
            f"{ours:.3f}", f"{case.bytes / ours / 1e6:,.0f}", f"{ours / floor:.2f}",
            f"{ours / eager:.2f}", "",
        ]  # fmt: skip
    compare_with_compiled(record, device, cases(device, sizes or Sizes(), dtype), rows)
    record.finish(failures=failures)
    print(f"copy {best['copy_gb_s']:,.0f} GB/s, GEMM {best['gemm_tflop_s']:,.0f} TFLOP/s")
    header = ["kernel", "ms", "GB/s", "to floor", "to eager", "to torch.compile"]
    print(table(header, [[name, *row] for name, row in rows.items()]))
    return 1 if failures else 0


def compare_with_compiled(record, device, every: Iterable[KernelCase], rows: dict) -> None:
    """Add torch.compile's times, last: compiling takes most of the time of this part."""
    entries = {e["name"]: e for e in record.entries if "milliseconds" in e}
    for case in every:
        name = f"{case.kernel} {case.name}"
        if name not in entries:
            continue
        if not record.in_time:
            record.leave(f"torch.compile of {name}")
            continue
        other = entries[name]["compiled"] = compiled(case, device)
        if isinstance(other, float):
            rows[name][-1] = f"{entries[name]['milliseconds'] / other:.2f}"
