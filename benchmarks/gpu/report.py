"""The tables of docs/gpu.md, from the committed results of ``make gpu``."""

from benchmarks import model
from benchmarks.common import load, paths_of, table

from . import layers


def layers_by_file() -> list[tuple[dict, str]]:
    """Each result of the layers and its table, newest first; a layer that a newer one measured is
    left out."""
    seen: set[str] = set()
    found = []
    for result in _results("layers"):
        entries = [e for e in result["entries"] if e["layer"] not in seen]
        measured = {e["layer"] for e in entries if e["provider"] == "pelt_fast" and "ratio" in e}
        entries = [e for e in entries if e["layer"] in measured]
        seen |= measured
        if entries:
            found.append((result, layers.report(entries)))
    return found


def models_by_file() -> list[tuple[dict, str]]:
    """Each result of whole steps in which ours was measured, newest first."""
    found = []
    for result in _results("models"):
        timed = {e["provider"] for e in result["entries"] if "seconds" in e}
        if "pelt_fast" in timed:
            found.append((result, model.report(result["entries"])))
    return found


def proof() -> str:
    """The results of every run of the numerics and of the sanitizer, oldest first."""
    lines = []
    for result in reversed(_results("numerics")):
        missed = sorted({e["test"].split("::")[1].split("[")[0] for e in result["entries"]})
        found = f"{result['passed']} passed, {result['failed']} missed ({', '.join(missed)})"
        found += f", {result['skipped']} skipped, {len(result['left'])} not run for lack of time"
        lines.append(["numerics", found, *_where(result)])
    for result in reversed(_results("sanitizer")):
        runs = ", ".join(sorted({e["tool"] for e in result["entries"]}))
        found = f"{len(result['entries'])} runs of {runs}: {result['errors']} with an error"
        lines.append(["compute-sanitizer", found, *_where(result)])
    return table(["part", "found", "device", "commit"], lines)


def _results(part: str) -> list[dict]:
    return [load(path) for path in paths_of(f"gpu-{part}")]


def _where(result: dict) -> list[str]:
    return [result["machine"]["device"], result["machine"]["commit"]]
