"""The read-only registers of the machine: ``%tid``, ``%ctaid``, ``%laneid`` and their like."""

import numpy as np

from .errors import Unsupported
from .registers import WARP


def fill(machine, first: int) -> None:
    """Set those that depend on which blocks run: ``first`` is the number of the first one."""
    across, down, _ = machine.launch.grid
    block = machine.block_of + first
    place = {"x": block % across, "y": block // across % down, "z": block // (across * down)}
    for axis, value in place.items():
        special(machine, f"%ctaid.{axis}")[:] = value
    cluster = machine.launch.cluster
    special(machine, "%clusterid.x")[:] = place["x"] // cluster
    special(machine, "%cluster_ctarank")[:] = place["x"] % cluster
    special(machine, "%cluster_ctaid.x")[:] = place["x"] % cluster


def special(machine, name: str) -> np.ndarray:
    """The array of one, (threads,) uint32."""
    if name not in machine.specials:
        machine.specials[name] = np.zeros(machine.threads, np.uint32)
        machine.specials[name][:] = _constant(machine, name)
    return machine.specials[name]


def _constant(machine, name: str) -> np.ndarray | int:
    """The value of one that is the same for every group of blocks."""
    numbers = machine.numbers % machine.block_threads
    grid, cluster = machine.launch.grid, machine.launch.cluster
    known = {
        "%tid.x": numbers, "%tid.y": 0, "%tid.z": 0,
        "%ntid.x": machine.block_threads, "%ntid.y": 1, "%ntid.z": 1,
        "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": grid[2],
        "%laneid": numbers % WARP, "%warpid": numbers // WARP,
        "%cluster_nctarank": cluster, "%cluster_nctaid.x": cluster, "%cluster_nctaid.y": 1,
        "%cluster_nctaid.z": 1, "%is_explicit_cluster": int(cluster > 1),
        "%ctaid.x": 0, "%ctaid.y": 0, "%ctaid.z": 0,
        "%clusterid.x": 0, "%clusterid.y": 0, "%clusterid.z": 0, "%cluster_ctarank": 0,
        "%cluster_ctaid.x": 0, "%cluster_ctaid.y": 0, "%cluster_ctaid.z": 0,
        "%nclusterid.x": -(-grid[0] // cluster), "%nclusterid.y": grid[1], "%nclusterid.z": grid[2],
    }  # fmt: skip
    if name not in known:
        raise Unsupported(f"register {name} is not known")
    return known[name]
