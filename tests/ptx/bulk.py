"""Bulk copies between global and shared memory: PTX ISA 9.7.9.25.5, ``cp.async.bulk``.

A load is counted by an mbarrier of each block that it writes to. A store is in a group of the
thread that started it. In mode late a load is done when nothing else can go on; a store reads its
source at the latest when ``wait_group.read`` says so, and writes when its group is waited for, or
at the end of the blocks.
"""

from collections.abc import Callable

import numpy as np

from .asynchronous import Work
from .boxes import Box, Run, scattered
from .clocks import BULK_STORE
from .decode import Step, opcode
from .errors import BadAccess, BadBarrier, MachineError, Unsupported
from .fences import check_init
from .mbarriers import SIZE, barrier_at, check_alive
from .moves import address_of
from .program import Immediate
from .shared_memory import OPAQUE
from .tensor_maps import check_acquired, map_at

_LOADS = (
    ("shared::cluster", "global", "mbarrier::complete_tx::bytes"),
    ("shared::cta", "global", "mbarrier::complete_tx::bytes"),
)
_STORE = ("global", "shared::cta", "bulk_group")
_TENSOR_ALIGN, _ALIGN = 128, 16
_DIMENSIONS = {f"{n}d": n for n in range(1, 6)}


@opcode("cp")
def build_bulk(machine, instruction):
    """``cp.async.bulk[.tensor.Nd]`` in tile mode, ``commit_group``, ``wait_group[.read]``"""
    if instruction.modifiers[:2] != ("async", "bulk"):
        return None
    words, operands = list(instruction.modifiers[2:]), list(instruction.operands)
    if words == ["commit_group"] and not operands:
        return _commit_step(machine)
    if words in (["wait_group"], ["wait_group", "read"]):
        return _wait_step(machine, operands, read="read" in words)
    rank = 0
    if words[:1] == ["tensor"]:
        rank = _DIMENSIONS.get(words[1], 0)
        words = words[2:]
        if not rank:
            return None
        if words[2:3] == ["tile"]:
            del words[2]
    form, hints = tuple(words[:3]), words[3:]
    if hints[-1:] == ["L2::cache_hint"]:
        hints.pop()
        operands.pop()
    if form in _LOADS and hints in ([], ["multicast::cluster"][: form[0] == "shared::cluster"]):
        return _load_step(machine, instruction, operands, rank, bool(hints))
    if form == _STORE and not hints:
        return _store_step(machine, instruction, operands, rank)
    return None


def _region_of(machine, operand, size, rank: int) -> Callable:
    """A function from a thread to what it copies of global memory: ``[map, {coordinates}]``, or
    ``[address]`` and a size."""
    address = address_of(machine, operand)
    if rank:
        if len(operand.coordinates) != rank:
            raise Unsupported(f"{len(operand.coordinates)} coordinates of {rank} dimensions")
        places = [machine.registers.source(item, "s32") for item in operand.coordinates]

        def region(thread: slice):
            at = int(address(thread)[0])
            check_acquired(machine, at, int(machine.warp_of[thread][0]))
            return Box(map_at(machine, at), tuple(int(place[thread][0]) for place in places), rank)
    else:
        sizes = machine.registers.source(size, "u32")

        def region(thread: slice):
            return Run(int(address(thread)[0]), int(sizes[thread][0]))

    return region


def _threads(machine):
    """A function from active threads to each of them as a range: few start bulk copies."""
    return lambda threads: [slice(n, n + 1) for n in machine.numbers[threads].tolist()]


def _attributed(instruction, do: Callable[[], None]) -> Callable[[], None]:
    """``do``, whose errors are the instruction's, whoever waits for it."""

    def run() -> None:
        try:
            do()
        except MachineError as error:
            if error.instruction is None:
                raise type(error)(str(error), instruction) from None
            raise

    return run


# ---- loads


def _load_step(machine, instruction, operands, rank: int, multicast: bool) -> Step | None:
    """``[dst], [map, {c}] or [src], (size), [mbarrier], (mask)``"""
    if len(operands) != 3 + (not rank) + multicast:
        return None
    mask = machine.registers.source(operands.pop(), "u16") if multicast else None
    dst, source, *size, barrier = operands
    region_of = _region_of(machine, source, size[0] if size else None, rank)
    to, barrier_of, each = address_of(machine, dst), address_of(machine, barrier), _threads(machine)
    shared, align = machine.shared, _TENSOR_ALIGN if rank else _ALIGN
    local = "shared::cta" in instruction.modifiers

    def start(thread) -> None:
        region, block = region_of(thread), machine.block_of[thread]
        index = int(shared.index(to(thread), block, region.size, align)[0])
        at = int(shared.index(barrier_of(thread), block, SIZE)[0])
        owners = {index // shared.stride, at // shared.stride}
        if len(owners) > 1 or (local and owners != {int(block[0])}):
            raise BadBarrier("the mbarrier of a bulk load must be in the block that it writes to")
        copies = [0] if mask is None else _blocks(machine, int(mask[thread][0]))
        if mask is not None:  # the same place in each block of the mask
            index, at = index % shared.stride, at % shared.stride
            first = int(block[0]) - int(block[0]) % shared.cluster
            copies = [(first + rank_) * shared.stride for rank_ in copies]
        targets = [(index + base, at + base) for base in copies]
        if machine.counts.on:
            machine.counts.bulk(*region.rows, load=True)
        _start_load(machine, instruction, int(machine.warp_of[thread][0]), region, targets)

    def run(threads):
        for thread in each(threads):
            start(thread)

    return Step(run)


def _blocks(machine, mask: int) -> list[int]:
    """The ranks in a mask of the blocks of a cluster."""
    cluster = machine.shared.cluster
    if not mask or mask >> cluster:
        raise BadAccess(f"a mask of {mask:#x} blocks in a cluster of {cluster}")
    return [rank for rank in range(cluster) if mask >> rank & 1]


def _start_load(machine, instruction, warp: int, region, targets) -> None:
    watch, known, parts = machine.watch, machine.watch.knowledge(warp), []
    for index, at in targets:
        check_alive(machine, at)
        barrier = barrier_at(machine, at)
        watch._after_writes(at + np.arange(SIZE), np.full(SIZE, warp), "uses")
        check_init(machine, barrier, warp)
        span = slice(index, index + region.size)
        _check_ordinary(machine, span)
        agent = watch.barrier_agent(at)
        number = watch.start(agent)
        watch.write_later(span, agent, number, known)
        parts.append((span, at, agent, number))

    def do() -> None:
        data = region.read(machine.memory)
        for span, at, agent, number in parts:
            check_alive(machine, at)
            _check_ordinary(machine, span)
            _place(machine, span, region, data)
            barrier = barrier_at(machine, at)
            barrier.learn(agent, number)
            barrier.complete(region.size)

    machine.asynchronous.start(Work(_attributed(instruction, do)))


def _check_ordinary(machine, span: slice) -> None:
    if machine.shared.mbarriers and (machine.shared.written[span] == OPAQUE).any():
        raise BadBarrier("a bulk copy of the bytes of an mbarrier")


def _order(machine, span: slice, swizzle: int):
    """Where the units of 16 bytes of a copy are in its bytes of shared memory."""
    offset = span.start % machine.shared.stride  # the window starts at a multiple of 1024
    return scattered(swizzle, offset % 1024, span.stop - span.start)


def _place(machine, span: slice, region, data: np.ndarray) -> None:
    """Write a copy's bytes into shared memory."""
    order = _order(machine, span, region.swizzle) if region.swizzle else slice(None)
    machine.shared.bytes[span].view("V16")[order] = data.view("V16")
    machine.shared.written[span] = 1


# ---- stores


class Store(Work):
    """A store. ``read`` takes the bytes, once; ``finish`` takes them and writes."""

    def __init__(self, machine, instruction, thread: int, region, span: slice, number: int):
        super().__init__(_attributed(instruction, self._write))
        self.machine, self.thread, self.region, self.span = machine, thread, region, span
        self.number = number
        self.read = _attributed(instruction, self._read)
        self.data: np.ndarray | None = None

    def _read(self) -> None:
        if self.data is not None:
            return
        machine, span = self.machine, self.span
        check_alive(machine, span.start)
        source = machine.shared.bytes[span].view("V16")
        swizzle = self.region.swizzle
        order = _order(machine, span, swizzle) if swizzle else slice(None)
        self.data = source[order].copy().view(np.uint8)

    def _write(self) -> None:
        self._read()
        self.region.write(self.machine.memory, self.data)


def _store_step(machine, instruction, operands, rank: int) -> Step | None:
    """``[map, {c}], [src]`` or ``[dst], [src], size``"""
    if len(operands) != 2 + (not rank):
        return None
    dst, source, *size = operands
    region_of = _region_of(machine, dst, size[0] if size else None, rank)
    from_, each = address_of(machine, source), _threads(machine)
    shared, align = machine.shared, _TENSOR_ALIGN if rank else _ALIGN

    def start(thread) -> None:
        region, block = region_of(thread), machine.block_of[thread]
        index = int(shared.index(from_(thread), block, region.size, align)[0])
        if index // shared.stride != block[0]:
            raise BadAccess("a bulk store reads shared memory of its own block only")
        if machine.counts.on:
            machine.counts.bulk(*region.rows, load=False)
        _start_store(machine, instruction, thread.start, region, slice(index, index + region.size))

    def run(threads):
        for thread in each(threads):
            start(thread)

    return Step(run)


def _start_store(machine, instruction, thread: int, region, span: slice) -> None:
    watch, warp = machine.watch, int(machine.warp_of[thread])
    agent = watch.agent(warp, BULK_STORE)
    number = watch.start(agent)
    each = np.arange(span.start, span.stop)
    machine.shared.check_written(each)
    watch.read_later(each, agent, number, watch.knowledge(warp))
    store = Store(machine, instruction, thread, region, span, number)
    machine.asynchronous.start(store, ("bulk", thread))


def _storing(machine, threads) -> list[int]:
    """Those of some threads that have started stores."""
    chosen = np.zeros(machine.threads, bool)
    chosen[threads] = True
    work = machine.asynchronous
    keys = {key[1] for key in (*work.open, *work.groups) if key[0] == "bulk"}
    return [thread for thread in sorted(keys) if chosen[thread]]


def _commit_step(machine) -> Step:
    """``cp.async.bulk.commit_group``: 9.7.9.25.5.6"""

    def run(threads):
        for thread in _storing(machine, threads):
            machine.asynchronous.commit(("bulk", thread))

    return Step(run)


def _wait_step(machine, operands, read: bool) -> Step | None:
    """``cp.async.bulk.wait_group[.read] N``: 9.7.9.25.5.7. A thread that waits has read its
    sources; for races its warp knows it."""
    if len(operands) != 1 or not isinstance(operands[0], Immediate):
        return None
    left, work, watch = operands[0].value, machine.asynchronous, machine.watch

    def wait(thread: int) -> None:
        key = ("bulk", thread)
        groups = work.groups.get(key, [])
        waited = [store for group in groups[: max(0, len(groups) - left)] for store in group]
        for store in waited:
            store.read()
        if not read:
            work.wait(key, left)
        if waited:
            warp = int(machine.warp_of[thread])
            agent = watch.agent(warp, BULK_STORE)
            watch.learn(warp, agent, max(store.number for store in waited))

    def run(threads):
        for thread in _storing(machine, threads):
            wait(thread)

    return Step(run)
