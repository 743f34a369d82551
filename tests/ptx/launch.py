"""Run a launch: groups of blocks one after another, in each mode that is asked for."""

import time

from .clusters import FILE
from .counts import Counts
from .errors import Unsupported
from .machine import EARLY, Launch, Machine, Mode
from .registers import WARP

THREADS = 1024  # of a group: more blocks together cost less a block, and more memory
GRID, CLUSTER = (2**31 - 1, 65535, 65535), 8  # the most blocks
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
    for wrong, said in _faults(launch):
        if wrong:
            raise Unsupported(f"{launch.entry.name}: {said}")


def _faults(launch: Launch):
    entry, grid, threads, cluster = launch.entry, launch.grid, launch.threads, launch.cluster
    yield (
        threads % WARP or not 0 < threads <= 1024,
        f"a block of {threads} threads: wanted a multiple of 32 up to 1024",
    )
    yield (
        entry.block not in (None, (threads, 1, 1)),
        f"a block of {threads} threads, where .reqntid says {entry.block}",
    )
    yield launch.dynamic < 0, f"{launch.dynamic} bytes of shared memory"
    yield (
        len(grid) != 3 or any(not 0 < n <= most for n, most in zip(grid, GRID)),
        f"a grid of {grid}: wanted three sizes from 1 to {GRID}",
    )
    yield not 0 < cluster <= CLUSTER, f"a cluster of {cluster} blocks: wanted 1 to {CLUSTER}"
    yield cluster > 1 and entry.target == "sm_80", "sm_80 has no clusters"
    yield grid[0] % cluster, f"{grid[0]} blocks are no whole clusters of {cluster}"
    yield (
        entry.most_registers > 255 or entry.most_registers * threads > FILE,
        f".maxnreg {entry.most_registers} for {threads} threads: wanted up to 255, and {FILE} in all",
    )
    yield (
        len(launch.parameters) < entry.parameter_bytes,
        f"{len(launch.parameters)} bytes of parameters, of {entry.parameter_bytes}",
    )


_KEPT = 8  # machines: registers of some megabytes each
_machines: dict[tuple, Machine] = {}


def machine_for(launch: Launch, blocks: int, mode: Mode) -> Machine:
    """A machine for ``blocks`` blocks: one that has decoded the same entry, if there is one."""
    key = (
        id(launch.entry),
        launch.grid,
        launch.threads,
        launch.dynamic,
        launch.cluster,
        blocks,
        mode,
    )
    machine = _machines.pop(key, None)
    if machine is None or len(machine.parameters) != len(launch.parameters) + 16:
        machine = Machine(launch, blocks, mode)
    else:
        machine.take(launch)
    _machines[key] = machine  # the newest is the last
    while len(_machines) > _KEPT:
        _machines.pop(next(iter(_machines)))
    return machine


def run(launch: Launch, mode: Mode = EARLY, counted: bool = False) -> Counts:
    """Execute all blocks; what the launch did."""
    check(launch)
    for allocation in launch.memory.allocations:
        allocation.watch_lines(launch.entry.uses_tensor_maps)
    counts, started = Counts(counted), time.perf_counter()
    clusters = max(1, THREADS // (launch.threads * launch.cluster))
    size = min(clusters * launch.cluster, launch.blocks)
    size = max(launch.cluster, size // launch.cluster * launch.cluster)
    used: dict[int, Machine] = {}
    for first in range(0, launch.blocks, size):
        blocks = min(size, launch.blocks - first)
        if blocks not in used:
            used[blocks] = machine_for(launch, blocks, mode)
            used[blocks].counts = counts
        try:
            used[blocks].run(first)
        except BaseException:
            _machines.clear()  # it stopped in the middle of something
            raise
    counts.seconds = time.perf_counter() - started
    counts.instructions = sum(machine.hits for machine in used.values())
    return counts
