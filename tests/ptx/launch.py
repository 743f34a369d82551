"""Run a launch: groups of blocks one after another, in each mode that is asked for."""

from .counts import Counts
from .errors import Unsupported
from .machine import Launch, Machine, Mode
from .registers import WARP

THREADS = 1024  # of a group: more blocks together cost less a block, and more memory
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_90a": 227 * 1024}


def check(launch: Launch) -> None:
    """Unsupported for a launch that the target would refuse."""
    target = launch.entry.target
    if target not in SHARED:
        raise Unsupported(f"target {target!r} is not known; known are {', '.join(SHARED)}")
    if launch.shared_bytes > SHARED[target]:
        raise Unsupported(
            f"{launch.entry.name} asks for {launch.shared_bytes} bytes of shared memory;"
            f" {target} has {SHARED[target]}"
        )
    if launch.threads % WARP or not 0 < launch.threads <= 1024:
        raise Unsupported(
            f"a block of {launch.threads} threads: wanted a multiple of 32 up to 1024"
        )
    if launch.grid[0] % launch.cluster:
        raise Unsupported(f"{launch.grid[0]} blocks are no whole clusters of {launch.cluster}")


def run(launch: Launch, mode: Mode = Mode(), counted: bool = False) -> Counts:
    """Execute all blocks; what the launch did."""
    check(launch)
    counts = Counts(counted)
    clusters = max(1, THREADS // (launch.threads * launch.cluster))
    size = min(clusters * launch.cluster, launch.blocks)
    size = max(launch.cluster, size // launch.cluster * launch.cluster)
    machines: dict[int, Machine] = {}
    first = 0
    while first < launch.blocks:
        now = min(size, launch.blocks - first)
        if now not in machines:
            machines[now] = Machine(launch, now, mode)
            machines[now].counts = counts
        machines[now].run(first)
        first += now
    counts.instructions = sum(m.hits for m in machines.values())
    return counts
