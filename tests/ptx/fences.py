"""Fences: PTX ISA 9.7.13.4 (fence, membar), and what must have one.

Memory is in order here, so most fences do nothing but tell ``watch.py`` and ``tensor_maps.py`` of
themselves. The asynchronous proxy, which bulk copies go through, sees an ``mbarrier.init`` only
after a fence: ``check_init``.
"""

from dataclasses import dataclass

import numpy as np

from .decode import Step, opcode
from .errors import Race
from .moves import address_of
from .program import Address, Immediate, Place
from .tensor_maps import acquire_map

_SCOPES = ("cta", "cluster", "gpu", "sys")
_ORDERS = ("sc", "acq_rel", "acquire", "release")
_NEVER = np.iinfo(np.int32).max


@dataclass
class Start:
    """How an mbarrier was initialised: by which thread, and at which clock of its warp. ``told``
    is the warp's clock at the thread's ``fence.mbarrier_init``."""

    thread: int
    warp: int
    clock: int
    place: Place
    told: int = _NEVER

    @staticmethod
    def now(machine, thread: int, place: Place) -> "Start":
        warp = int(machine.warp_of[thread])
        return Start(thread, warp, int(machine.watch.clocks[warp, warp]), place)


def check_init(machine, barrier, warp: int) -> None:
    """Race where a warp starts a bulk load that counts at a barrier, and no fence has shown the
    barrier's initialisation to the asynchronous proxy.

    PTX asks for ``fence.mbarrier_init`` by the thread that initialised it, or for
    ``fence.proxy.async``. Triton 3.6 emits neither for a barrier that its own block alone uses, but
    ``mbarrier.init; bar.sync; ...; cp.async.bulk``. So there a barrier of the block or of the
    cluster that the initialiser came to is enough; its later versions, as CUTLASS, have the fence
    where another block's load counts.
    """
    start, watch = barrier.start, machine.watch
    clocks, fenced = watch.clocks[warp], watch.fenced[warp]
    if clocks[start.warp] >= start.told or fenced[start.warp] >= start.clock:
        return
    own = machine.block_of[start.thread] == warp // (machine.warps // machine.blocks)
    if own and watch.met[start.warp] >= start.clock:
        return
    wanted = "" if own else ", which another block needs"
    raise Race(
        f"a bulk load of warp {warp} counts at {barrier}, and nothing has shown its initialisation at"
        f" {start.place} to the asynchronous proxy: no fence.mbarrier_init by thread"
        f" {start.thread % machine.block_threads} and no fence.proxy.async{wanted}"
    )


def _nothing(threads) -> None:
    """What has no effect here: memory is always in order."""


@opcode("fence", "membar")
def build_fence(machine, instruction):
    """``fence[.order].scope``, ``fence.proxy.async[.space]``, ``fence.mbarrier_init``, ``membar``"""
    root, modifiers = instruction.root, instruction.modifiers
    if root == "membar":
        return _ordering(machine) if modifiers in (("cta",), ("gl",), ("sys",)) else None
    if modifiers[:1] == ("proxy",):
        return _proxy(machine, instruction)
    if modifiers == ("mbarrier_init", "release", "cluster"):
        return _init_fence(machine) if not instruction.operands else None
    order = [m for m in modifiers if m in _ORDERS]
    scope = [m for m in modifiers if m in _SCOPES]
    if (*order, *scope) != modifiers or len(scope) != 1 or len(order) > 1:
        return None
    return Step(_nothing) if order == ["acquire"] else _ordering(machine)


def _ordering(machine):
    """A fence that releases: a relaxed arrival after it tells what was done before it."""
    if machine.launch.cluster == 1:
        return Step(_nothing)

    def run(threads) -> None:
        for warp in machine.warps_of(threads).tolist():
            machine.states["released", warp] = machine.watch.release(warp)

    return Step(run)


def _init_fence(machine):
    """``fence.mbarrier_init.release.cluster``: of the barriers that these threads initialised. A
    relaxed arrival after it tells of all else that was done before it too, which PTX does not say."""
    order = _ordering(machine)

    def run(threads) -> None:
        here, clocks = set(machine.numbers[threads].tolist()), machine.watch.clocks
        for start in (barrier.start for barrier in machine.mbarriers.values()):
            if start.thread in here:
                start.told = min(start.told, int(clocks[start.warp, start.warp]))
        order.run(threads)

    return Step(run)


def _proxy(machine, instruction):
    kind = instruction.modifiers[1:]
    if kind == ("async", "global"):
        return Step(_nothing)  # only shared memory is watched
    if kind in (("async",), ("async", "shared::cta"), ("async", "shared::cluster")):
        return Step(lambda threads: machine.watch.fence(machine.warps_of(threads)))
    if kind[:1] == ("tensormap::generic",):
        return _map_fence(machine, instruction, kind[1:])
    return None


def _map_fence(machine, instruction, kind):
    """``fence.proxy.tensormap::generic.acquire.scope [a], 128`` and ``.release.scope``"""
    if len(kind) != 2 or kind[1] not in _SCOPES:
        return None
    if kind[0] == "release":
        return Step(_nothing) if not instruction.operands else None
    if kind[0] != "acquire":
        return None
    where, size = instruction.operands
    if not isinstance(where, Address) or size != Immediate(128):
        return None
    address = address_of(machine, where)

    def run(threads) -> None:
        warps = machine.warp_of[threads].tolist()
        for at, warp in set(zip(address(threads).tolist(), warps)):
            acquire_map(machine, at, warp)

    return Step(run)
