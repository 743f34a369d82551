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
    """Each result of whole steps and its table, newest first; a method on a model that a newer one
    measured is left out."""
    seen: set[tuple[str, str]] = set()
    found = []
    for result in _results("models"):
        entries = [e for e in result["entries"] if (e["model"], e["method"]) not in seen]
        timed = (e for e in entries if e["provider"] == "pelt_fast" and "seconds" in e)
        measured = {(e["model"], e["method"]) for e in timed}
        entries = [e for e in entries if (e["model"], e["method"]) in measured]
        seen |= measured
        if entries:
            found.append((result, model.report(entries)))
    return found


def proof() -> str:
    """The results of every run of the numerics and of the sanitizer, oldest first."""
    lines = []
    for result in reversed(_results("numerics")):
        found = f"{result['passed']} passed, {_missed(result)}, {result.get('skipped', 0)} skipped"
        found += f", {len(result['left'])} not run for lack of time"
        lines.append(["numerics", found, *_where(result)])
    for result in reversed(_results("sanitizer")):
        runs = ", ".join(sorted({e["tool"] for e in result["entries"]}))
        found = f"{len(result['entries'])} runs of {runs}: {result['errors']} with an error"
        lines.append(["compute-sanitizer", found, *_where(result)])
    return table(["part", "found", "device", "commit"], lines)


def _missed(result: dict) -> str:
    """How many tests missed, with their names."""
    failed = (e["test"] for e in result["entries"] if e.get("outcome") == "failed")
    names = sorted({test.split("::")[1].split("[")[0] for test in failed})
    return f"{result.get('failed', 0)} missed" + (f" ({', '.join(names)})" if names else "")


def _results(part: str) -> list[dict]:
    return [load(path) for path in paths_of(f"gpu-{part}")]


def _where(result: dict) -> list[str]:
    return [result["machine"]["device"], result["machine"]["commit"]]
