"""Whether a measurement can be trusted: nobody else works on the machine, the floor's times agree,
and what is recorded is what is committed."""

import os
import subprocess
import time
from pathlib import Path

from .common import REPOSITORY
from .timing import quartiles

MOST_BUSY = 0.25  # of the cores, by others
MOST_SPREAD = 0.15  # of the median, between the quartiles of a floor's times


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many cores work while this process waits; None where the system does not say."""
    before, start = _worked(), time.monotonic()
    time.sleep(seconds)
    after = _worked()
    if before is None or after is None:
        return None
    return (after - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)


def _worked(stat: Path = Path("/proc/stat")) -> int | None:
    """Ticks that all cores have worked, or were taken by other machines on the host."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return user + nice + system + irq + softirq + steal


def loaded(busy: float | None, cores: int | None = None) -> str | None:
    """What to say if others keep too much of the machine busy."""
    cores = cores or os.cpu_count() or 1
    if busy is None or busy <= MOST_BUSY * cores:
        return None
    return f"other processes keep {busy:.1f} of {cores} cores busy"


def spread(entries: list[dict], floors: tuple[str, ...]) -> str | None:
    """What to say if the times of the providers ``floors`` spread too far."""
    worst = 0.0
    for entry in entries:
        if entry.get("provider") in floors and entry.get("seconds"):
            low, middle, high = quartiles(entry["seconds"])
            worst = max(worst, (high - low) / middle)
    if worst <= MOST_SPREAD:
        return None
    return f"the middle half of the floor's times spreads over {worst:.0%} of their median"


def uncommitted(repository: Path = REPOSITORY) -> list[str]:
    """The tracked files that differ from the commit; none where git does not say."""
    command = ["git", "-C", str(repository), "status", "--porcelain", "--untracked-files=no"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line[3:] for line in ran.stdout.splitlines()]


def check(timed: bool = True) -> None:
    """ValueError if a result of this tree, or times of this machine, should not be recorded."""
    changed = uncommitted()
    if changed:
        raise ValueError(
            f"--record needs a committed tree; these files have changed: {', '.join(changed[:5])}"
        )
    found = loaded(busy_cores()) if timed else None
    if found is not None:
        raise ValueError(f"--record needs a quiet machine, but {found}")
