"""Seconds of a new process: torch alone, the package, its functions, ``pelt-fast info``.

``python -m benchmarks.import_time [--repeats 5] [--explain 10]``: the median over repeats that take
turns, as a ratio to ``import torch``, beside the ratio that is promised. ``--explain`` lists the
modules beyond torch's that took the longest in ``import pelt_fast.functional``. What is imported,
and not how long it takes, is tested in tests/test_import.py.
"""

import argparse
import statistics
import subprocess
import sys
import time

TORCH = "import torch"
# the command, and its promised ratio to ``import torch``, if any
PROCESSES = {
    "import torch": (["-c", TORCH], None),
    "import pelt_fast": (["-c", "import pelt_fast"], 1.3),
    "import pelt_fast.functional": (["-c", "import pelt_fast.functional"], 1.3),
    "pelt-fast info": (["-m", "pelt_fast", "info"], 1.5),
    "import pelt_fast; pelt_fast.inject": (["-c", "import pelt_fast; pelt_fast.inject"], None),
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def measured(repeats: int) -> dict[str, float]:
    """The median seconds of each process, after a first run that fills the file cache."""
    for arguments, _ in PROCESSES.values():
        seconds(arguments)
    runs: dict[str, list[float]] = {name: [] for name in PROCESSES}
    for _ in range(repeats):
        for name, (arguments, _) in PROCESSES.items():
            runs[name].append(seconds(arguments))
    return {name: statistics.median(times) for name, times in runs.items()}


def slowest(count: int) -> list[tuple[float, str]]:
    """(own milliseconds, module) of modules that ``import pelt_fast.functional`` adds to torch."""
    code = (
        f"{TORCH}; import sys; print('torch is in', file=sys.stderr); import pelt_fast.functional"
    )
    command = [sys.executable, "-X", "importtime", "-c", code]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = ran.stderr.partition("torch is in")[2].strip().splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines]
    return sorted(((int(own) / 1000, name.strip()) for own, _, name in rows), reverse=True)[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--explain", type=int, default=0, metavar="N")
    options = parser.parse_args()
    found = measured(options.repeats)
    torch_alone = found["import torch"]
    print(f"{'process':<36} {'seconds':>8} {'ratio':>6}  promised")
    missed = 0
    for name, (_, limit) in PROCESSES.items():
        ratio = found[name] / torch_alone
        missed += limit is not None and ratio > limit
        promised = "" if limit is None else f"<= {limit}"
        print(f"{name:<36} {found[name]:>8.2f} {ratio:>6.2f}  {promised}")
    for own, name in slowest(options.explain):
        print(f"{own:8.1f} ms  {name}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
