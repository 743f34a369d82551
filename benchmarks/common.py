"""Timing, saved bytes, tables and result files."""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent


def interleaved(
    steps: dict[str, Callable[[], None]], repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each step; one of each in turn, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for i in range(warmup + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def saved_bytes(forward: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes kept for backward by ``forward``: unique storages, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

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


def machine() -> dict:
    """What a result depends on: versions, device, threads, commit."""
    names = ("torch", "transformers", "peft", "triton")
    return {
        "time": datetime.now().isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "device": _device(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def write(name: str, result: dict, folder: Path | None = None) -> Path:
    """Write ``result`` and the machine as ``<device>-<date>-<commit>-<name>.json``; never over
    another result."""
    about = machine()
    kind = "cpu" if about["device"].startswith("CPU") else about["device"].split()[-1].lower()
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{kind}-{about['time'][:10]}-{about['commit']}-{name}"
    path = folder / f"{stem}.json"
    count = 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"machine": about, **result}, indent=2) + "\n")
    os.replace(part, path)
    return path


def newest(name: str) -> dict:
    """The newest committed result called ``name``."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob(f"*-{name}*.json")]
    if not results:
        raise FileNotFoundError(f"no result {name!r} in {RESULTS}")
    return max(results, key=lambda result: result["machine"]["time"])
