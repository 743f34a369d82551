"""Figures of a result file: bars of ratio to the frozen floor, memory, traffic, prediction; curves
of the cost of many methods.

SVG, the same bytes for the same file and matplotlib.
"""

from collections.abc import Callable
from pathlib import Path

from . import layer, model, scale, several
from .common import load

WIDTH = 9.0
# the parts that are drawn as curves, and over what; None: over what the title names
OVER = {"several": "methods in the model, in a batch of 16 rows", "scale": None}


def draw(result: Path, folder: Path) -> list[Path]:
    """The figures of one result file, written to ``folder``; ValueError for a part without any."""
    found = load(result)
    part = str(found.get("part"))
    if part.split("-")[0] not in FIGURES:
        raise ValueError(f"{result}: no figures for part {part!r}, only for {', '.join(FIGURES)}")
    return draw_entries(part, found["entries"], folder)


def draw_entries(part: str, entries: list[dict], folder: Path) -> list[Path]:
    """The figures of the entries of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for title, bars, unit, line in FIGURES[part.split("-")[0]](entries):
        if bars:
            path = folder / f"{part}-{title.split(',')[0].replace(' ', '-')}.svg"
            if part in OVER:
                _curves(title, bars, unit, line, path, OVER[part] or title)
            else:
                _bars(title, bars, unit, line, path)
            paths.append(path)
    return paths


Figure = tuple[str, dict[str, dict[str, float]], str, float | None]


def _layers(entries: list[dict]) -> list[Figure]:
    bars: dict[str, dict[str, float]] = {}
    for row in layer.rows(entries):
        if row["mode"] == layer.MODES[-1] and row["provider"] != "frozen":
            bars.setdefault(row["layer"], {})[row["provider"]] = row["ratio"][1]
    return [("time, forward + backward", bars, "frozen layer = 1", 1.0)]


def _models(entries: list[dict]) -> list[Figure]:
    times: dict[str, dict[str, float]] = {}
    saved: dict[str, dict[str, float]] = {}
    for row in model.rows(entries):
        name = f"{row['model']}, {row['method']}"
        if "to_frozen" in row and row["provider"] != "frozen":
            times.setdefault(name, {})[row["provider"]] = row["to_frozen"][1]
        if row["saved_bytes"] is not None:
            saved.setdefault(name, {})[row["provider"]] = row["saved_bytes"] / 1e6
    return [("time, a training step", times, "frozen model = 1", 1.0),
            ("memory, kept for backward", saved, "MB", None)]  # fmt: skip


def _several(entries: list[dict]) -> list[Figure]:
    return [("cost, a training step", several.curves(entries), "one method alone = 1", 1.0)]


def _scale(entries: list[dict]) -> list[Figure]:
    by_axis = scale.curves(entries)
    return [(axis, curves, "frozen model = 1", 1.0) for axis, curves in by_axis.items()]


def _traffic(entries: list[dict]) -> list[Figure]:
    bars: dict[str, dict[str, float]] = {}
    for entry in entries:
        bars.setdefault(entry["subject"], {})[entry["provider"]] = entry["both"]
    return [("passes, forward + backward", bars, "P, reads and writes of the activation", None)]


def _predicted(entries: list[dict]) -> list[Figure]:
    bars: dict[str, dict[str, float]] = {}
    for entry in entries:
        if entry["ratio"] is not None and entry["provider"] != "frozen":
            bars.setdefault(entry["layer"], {})[entry["provider"]] = entry["ratio"]
    device = entries[0]["device"] if entries else ""
    return [(f"predicted, {device}", bars, "frozen layer = 1", 1.0)]


FIGURES: dict[str, Callable[[list[dict]], list[Figure]]] = {
    "layer": _layers, "model": _models, "equal": _models, "traffic": _traffic,
    "predict": _predicted, "several": _several, "scale": _scale,
}  # fmt: skip


def _pyplot():
    """Pyplot without a window, whose figures have the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pelt_fast"
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})
    _pyplot().close(figure)


def _bars(
    title: str, bars: dict[str, dict[str, float]], unit: str, line: float | None, path: Path
) -> None:
    """One group a row, one bar a provider; ours first and in one colour throughout."""
    from matplotlib.patches import Patch

    pyplot = _pyplot()
    providers = sorted({p for group in bars.values() for p in group}, key=_order)
    colours = {p: pyplot.get_cmap("tab10")(i % 10) for i, p in enumerate(providers)}
    count = sum(len(group) + 1 for group in bars.values())
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.9 + 0.19 * count), layout="constrained")
    place, ticks = 0.0, []
    for group in bars.values():
        first = place
        for provider in sorted(group, key=_order):
            axes.barh(place, group[provider], color=colours[provider])
            axes.text(group[provider], place, f" {group[provider]:.3g}", va="center", fontsize=6)
            place += 1
        ticks.append((first + place - 1) / 2)
        place += 1
    axes.set_yticks(ticks, list(bars), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    if line is not None:
        axes.axvline(line, color="gray", linestyle=":")
    handles = [Patch(color=colours[p], label=p) for p in providers]
    axes.legend(handles=handles, fontsize=7, loc="best")
    _save(figure, path)


def _curves(
    title: str,
    curves: dict[str, dict[str, float]],
    unit: str,
    line: float | None,
    path: Path,
    over: str,
) -> None:
    """One curve a row, over the size that ``over`` names."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.0), layout="constrained")
    counts = sorted({int(count) for curve in curves.values() for count in curve})
    for name, curve in curves.items():
        axes.plot([int(count) for count in curve], list(curve.values()), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel(over)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    if line is not None:
        axes.axhline(line, color="gray", linestyle=":")
    axes.legend(fontsize=7, loc="best")
    _save(figure, path)


def _order(provider: str) -> tuple[int, str]:
    known = ("pelt_fast", "kernels", "frozen")
    place = next((i for i, name in enumerate(known) if provider.startswith(name)), len(known))
    return place, provider
