"""How the cost of a method grows: with tokens, layers, rank, prefix length, methods in one batch.

    pelt-fast bench scale --method lora --axis rank tokens

An axis changes one size of a step (forward, backward, AdamW) and keeps the others. At each size the
frozen model and the injected one take turns. The method's own part is the difference of the two in
a round. An exponent is the slope of the logarithms of cost over size: 1 is linear. All rows have
the same length, so that tokens grow by rows and attention grows with them.
"""

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator

import torch
from torch import nn

import pelt_fast
from pelt_fast import PeltConfig

from . import whole
from .common import check_names, table
from .memory import peak_growth, standing
from .model import methods
from .record import Record
from .shapes import Shape, build, shape
from .timing import rounds
from .whole import Trained

FROZEN, OURS = "frozen", "pelt_fast"
# axis: its values, and the methods whose cost it changes
AXES = {
    "tokens": ((128, 512, 2048, 8192), ("lora", "mam")),
    "layers": ((1, 2, 4, 8), ("lora", "mam")),
    "rank": ((4, 16, 64, 128, 256, 512), ("lora", "scaled_parallel_adapter")),
    "prefix": ((8, 32, 128, 512, 1024), ("prefix_nomlp",)),
    "methods": ((2, 8, 32), ("lora",)),
}
QUICK_VALUES = 3  # of each axis, the smallest


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run. ``methods``: instead of each axis' own."""

    axes: tuple[str, ...] = tuple(AXES)
    methods: tuple[str, ...] | None = None
    models: tuple[str, ...] = ("roberta-base",)
    values: int | None = None
    layers: int = 2
    rows: int = 8
    length: int = 64
    repeats: int = 5
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


QUICK = Plan(values=QUICK_VALUES, repeats=3)


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of one axis: the model's shape, the method, rows, and how many of the method."""

    axis: str
    method: str
    value: int
    shape: Shape
    config: PeltConfig
    rows: int
    count: int = 1


def wanted(plan: Plan) -> list[Point]:
    """All sizes. ValueError for a name that does not exist, or a method that an axis leaves as it
    is."""
    check_names("axis", plan.axes, AXES)
    check_names("method", plan.methods or (), methods())
    if len(plan.models) != 1:
        raise ValueError(f"scale runs on one model, got {', '.join(plan.models)}")
    return [
        _point(plan, axis, name, value)
        for axis in plan.axes
        for name in plan.methods or AXES[axis][1]
        for value in AXES[axis][0][: plan.values]
    ]


def _point(plan: Plan, axis: str, name: str, value: int) -> Point:
    config, model_shape = methods()[name], shape(plan.models[0])
    layers = value if axis == "layers" else plan.layers
    if axis in ("rank", "prefix"):
        config = _resized(config, axis, value)
    return Point(
        axis, name, value, dataclasses.replace(model_shape, layers=layers), config,
        rows=max(1, value // plan.length) if axis == "tokens" else plan.rows,
        count=value if axis == "methods" else 1,
    )  # fmt: skip


def _resized(config: PeltConfig, axis: str, size: int) -> PeltConfig:
    """The method with its ranks, or its prefixes, of ``size``."""
    changed = [m for m in config.modifications if (m.form == "prefix") == (axis == "prefix")]
    if not changed:
        raise ValueError(f"--axis {axis} changes nothing in {config.name!r}: choose other methods")
    return dataclasses.replace(config, modifications=tuple(
        dataclasses.replace(m, size=size) if m in changed else m for m in config.modifications
    ))  # fmt: skip


def run(plan: Plan, record: Record, progress: bool = True) -> list[dict]:
    """Measure every size; returns the entries."""
    for point in wanted(plan):
        if not record.in_time:
            record.leave(f"{point.method}, {point.axis} {point.value}")
            continue
        for entry in measure(plan, point):
            record.add(axis=point.axis, method=point.method, value=point.value, **entry)
    record.finish()
    return record.entries


def measure(plan: Plan, point: Point) -> Iterator[dict]:
    """The entries of one size: frozen and ours, seconds of each round and peak memory."""
    torch.manual_seed(0)
    base = build(point.shape, longest=plan.length + 8)
    base = base.to(plan.device, plan.dtype).requires_grad_(False)
    lengths = [(plan.length, 8)]
    batches = whole.batches(base, point.rows, plan.length, 8, lengths, 1, plan.device)
    frozen = Trained(FROZEN, copy.deepcopy(base), None, to_embeddings=True)
    both = [frozen, _injected(base, point)]
    steps = {trained.name: whole.stepper(trained, batches) for trained in both}
    device = torch.device(plan.device)
    seconds = rounds(steps, plan.repeats, device=device)
    for trained in both:
        growth = peak_growth(lambda step=steps[trained.name]: step(0), device)
        peak = None if growth is None else standing(trained.model) + growth
        yield dict(provider=trained.name, seconds=seconds[trained.name], peak_bytes=peak)


def _injected(base: nn.Module, point: Point) -> Trained:
    """The injected model; with several methods the rows run under them in turn."""
    if point.count == 1:
        return Trained(OURS, pelt_fast.inject(base, point.config), None)
    names = [f"method{i}" for i in range(point.count)]
    model = pelt_fast.inject_named(base, dict.fromkeys(names, point.config), together=True)
    routes = [names[i % len(names)] for i in range(point.rows)]
    return Trained(OURS, model, None, around=functools.partial(pelt_fast.route, model, routes))


def rows(entries: list[dict]) -> list[dict]:
    """One row for each size: medians, the ratio to the frozen model and the method's own part."""
    sizes: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        key = entry["axis"], entry["method"], entry["value"]
        sizes.setdefault(key, {})[entry["provider"]] = entry
    found = []
    for (axis, method, value), pair in sizes.items():
        if pair.keys() != {FROZEN, OURS}:
            continue
        ours, frozen = pair[OURS]["seconds"], pair[FROZEN]["seconds"]
        each = list(zip(ours, frozen, strict=True))
        found.append(dict(
            axis=axis, method=method, value=value, peak=pair[OURS]["peak_bytes"],
            frozen=statistics.median(frozen), ours=statistics.median(ours),
            ratio=statistics.median(a / b for a, b in each),
            own=statistics.median(a - b for a, b in each),
        ))  # fmt: skip
    return found


def exponent(values: list[float], costs: list[float | None]) -> float | None:
    """The slope of log cost over log size, by least squares; None where a cost is unknown, or not
    above zero."""
    if len(values) < 2 or any(cost is None or cost <= 0 for cost in costs):
        return None
    logs = [[math.log(n) for n in numbers] for numbers in (values, costs)]
    return statistics.linear_regression(*logs).slope


def growth(entries: list[dict]) -> list[dict]:
    """For each axis and method, the exponents of the costs."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows(entries):
        lines.setdefault((row["axis"], row["method"]), []).append(row)
    found = []
    for (axis, method), line in lines.items():
        values = [row["value"] for row in line]
        slopes = {
            cost: exponent(values, [row[cost] for row in line])
            for cost in ("frozen", "ours", "own", "peak")
        }
        found.append(dict(axis=axis, method=method, **slopes))
    return found


def report(entries: list[dict]) -> str:
    """The sizes, and below them the exponents."""
    header = ["axis", "method", "size", "frozen, ms", "ours, ms", "ratio", "own part, ms",
              "peak, MB"]  # fmt: skip
    sizes = [
        [row["axis"], row["method"], str(row["value"]), f"{1e3 * row['frozen']:.1f}",
         f"{1e3 * row['ours']:.1f}", f"{row['ratio']:.2f}", f"{1e3 * row['own']:.1f}",
         "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"]
        for row in rows(entries)
    ]  # fmt: skip
    slopes = [
        [row["axis"], row["method"],
         *("" if row[cost] is None else f"{row[cost]:.2f}"
           for cost in ("frozen", "ours", "own", "peak"))]
        for row in growth(entries)
    ]  # fmt: skip
    exponents = ["exponent of", "method", "frozen", "ours", "own part", "peak"]
    return f"{table(header, sizes)}\n\n{table(exponents, slopes)}"


def curves(entries: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each axis, the ratio to the frozen model by size: a curve for each method."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows(entries):
        curve = found.setdefault(row["axis"], {}).setdefault(row["method"], {})
        curve[str(row["value"])] = row["ratio"]
    return found
