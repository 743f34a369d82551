"""Timing, saved bytes, tables and result files."""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .timing import rounds

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent


def interleaved(
    steps: dict[str, Callable[[], None]], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each step. The steps take turns, so that drift is equal for all."""
    turns = {name: lambda _, step=step: step() for name, step in steps.items()}
    return {n: statistics.median(t) for n, t in rounds(turns, repeats, warmup).items()}


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes kept for backward by ``forward``: unique storages, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a saved output would refer to its own node: a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storages.values())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def cell(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number of a table; "" when it is not known."""
    return "" if value is None or value != value else format(value * scale, form)


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for a name that is not known; it lists those that are."""
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose {', '.join(known)}")


def machine() -> dict:
    """The facts behind a result: versions, device, threads, commit."""
    names = ("torch", "transformers", "peft", "triton")
    return {
        "time": datetime.now().isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "device": _device(),
        "threads": torch.get_num_threads(),
        "command": _command(),
    }


def _command() -> str:
    """The command line, without the folders of this machine."""
    given = sys.orig_argv
    words = ["python", *given[given.index("-m") :]] if "-m" in given else sys.argv
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    if "PELT_FAST_COMMIT" in os.environ:  # a copy of the tree without its history
        return os.environ["PELT_FAST_COMMIT"]
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def result_path(name: str, about: dict, folder: Path | None = None) -> Path:
    """``<device>-<date>-<commit>-<name>.json``, with a number if that file exists: a result is
    never overwritten."""
    folder = RESULTS if folder is None else folder
    stem = f"{_kind(about['device'])}-{about['time'][:10]}-{about['commit']}-{name}"
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path


def _kind(device: str) -> str:
    """ "cpu", or the word with the number in a GPU's name: "NVIDIA H100 80GB HBM3" is h100."""
    words = ["cpu"] if device.startswith("CPU") else device.split()
    return next((word for word in words if re.search(r"\d", word)), words[-1]).lower()


def dump(path: Path, data: dict) -> None:
    """Write JSON. An interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def write(name: str, result: dict, folder: Path | None = None) -> Path:
    """Write ``result`` and the machine under :func:`result_path`."""
    about = machine()
    path = result_path(name, about, folder)
    dump(path, {"machine": about, **result})
    return path


def load(path: Path) -> dict:
    """Read a result file. Raises ValueError for a file that is not one."""
    try:
        result = json.loads(path.read_text())
        result["machine"]["time"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file: {error!r}") from None
    return result


def kind_of_machine(about: dict) -> str:
    """The instruction set of a CPU, or a GPU's name, from a result's "machine": times of one kind
    are not those of another."""
    return about["device"].partition(",")[0]


def newest(name: str) -> dict:
    """The newest committed result called ``name``."""
    return load(newest_path(name))


def newest_of_each_kind(name: str) -> list[dict]:
    """The newest committed result called ``name`` of each kind of machine."""
    found: dict[str, dict] = {}
    for path in paths_of(name):
        result = load(path)
        found.setdefault(kind_of_machine(result["machine"]), result)
    return [found[kind] for kind in sorted(found, reverse=True)]


def newest_path(name: str) -> Path:
    """The file of the newest committed result. Raises FileNotFoundError without one."""
    return paths_of(name)[0]


def paths_of(name: str) -> list[Path]:
    """The files of all committed results called ``name``, newest first. Raises FileNotFoundError
    without one."""
    paths = [path for path in RESULTS.glob("*.json") if _part(path) == name]
    if not paths:
        raise FileNotFoundError(f"no result {name!r} in {RESULTS}")
    return sorted(paths, key=lambda path: load(path)["machine"]["time"], reverse=True)


def not_superseded(name: str) -> list[dict]:
    """The results called ``name``, each with the methods that no newer one of the same kind of
    machine has: one kind after the other, the newest first."""
    found: dict[str, list[dict]] = {}
    seen: set[tuple[str, str | None]] = set()
    for path in paths_of(name):
        result = load(path)
        kind = kind_of_machine(result["machine"])
        entries = [e for e in result.get("entries", []) if (kind, e.get("method")) not in seen]
        seen |= {(kind, entry.get("method")) for entry in entries}
        if entries:
            found.setdefault(kind, []).append(result | {"entries": entries})
    return [result for kind in sorted(found, reverse=True) for result in found[kind]]


def merged(name: str) -> list[dict]:
    """The entries of :func:`not_superseded`, of the kind of machine that has most of them."""
    kinds: dict[str, list[dict]] = {}
    for result in not_superseded(name):
        kinds.setdefault(kind_of_machine(result["machine"]), []).extend(result["entries"])
    return max(kinds.values(), key=len)


def parts(start: str) -> list[str]:
    """The parts whose name begins with ``start`` and that have a committed result."""
    return sorted({part for part in map(_part, RESULTS.glob("*.json")) if part.startswith(start)})


def _part(path: Path) -> str:
    """The part of the name after device, date and commit, without a number."""
    return re.sub(r"^.*?-\d{4}-\d\d-\d\d-[0-9a-z]+-|-\d$", "", path.stem)
