"""How the counted order of tiles compares with times that an H200 took of the same tiles."""

import json
from dataclasses import replace

import numpy as np

from benchmarks.common import RESULTS
from pelt_fast.kernels.tile import Tile

from .emulate import table
from .tile_words import Counted, named

HEAD = ("case", "tiles", "order alike", "first counted", "its time to the least", "clocks to time")


def measured() -> tuple[dict[str, dict[Tile, float]], dict]:
    """Case -> tile -> milliseconds, of the newest run of tuning; the facts of its machine."""
    result = json.loads(max(RESULTS.glob("h200*-gpu-tune.json")).read_text())
    times: dict[str, dict[Tile, float]] = {}
    for entry in result["entries"]:
        for tile, told in entry.get("tried", ()):
            if not isinstance(told, str):
                times.setdefault(entry["case"], {})[without_ranks(Tile(**tile))] = told
    return times, result["machine"]


def without_ranks(tile: Tile) -> Tile:
    """A tile without its block of ranks: the kernels take no larger one than the rank."""
    return replace(tile, block_r=0)


def alike(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation: 1 where the orders are the same, -1 where one is reversed."""
    ranks = [np.argsort(np.argsort(each)) for each in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def lines(found: dict[tuple, Counted]) -> list[tuple]:
    """A line for each case of sm90 that was counted and timed."""
    times, _ = measured()
    said = []
    for key, counted in found.items():
        known = times.get(counted.case, {}) if key[1] == "sm90" and key[2] == 16 else {}
        both = [(tile, each, known[without_ranks(tile)]) for tile, each in counted.ordered()
                if without_ranks(tile) in known]  # fmt: skip
        if len(both) < 3:
            continue
        clocks, taken = [each.clocks for _, each, _ in both], [ms for *_, ms in both]
        said.append((
            counted.case, len(both), f"{alike(clocks, taken):.2f}", named(both[0][0]),
            f"{taken[0] / min(taken):.2f}", f"{clocks[0] / 1.83e6 / taken[0]:.2f}",
        ))  # fmt: skip
    return said


def section(found: dict[tuple, Counted]) -> list[str]:
    """What the page says of it."""
    _, machine = measured()
    return [
        "### The order of counts, and times", "",
        f"Tiles that tuning timed on an {machine['device']} at {machine['commit']}, as many as were"
        " counted too. *order alike*: Spearman's rank correlation of clocks and times. *clocks to"
        " time*: the clocks of the first, at the clock of the peaks, over its time: what the model"
        " leaves out is latency, and the depth of the pipeline with it.", "",
        table(HEAD, lines(found)), "",
    ]  # fmt: skip
