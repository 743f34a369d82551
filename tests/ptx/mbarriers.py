"""Barriers in shared memory that count arrivals and bytes: PTX ISA 9.7.13.15, ``mbarrier``.

A phase ends when all its arrivals have come and no bytes are to come. A wait never gives false
here: the thread waits, and executes the instruction again when the phase has ended. The state that
an arrival gives is the number of the phase.
"""

import numpy as np

from .clocks import Knowledge
from .decode import CONTROL, Step, opcode
from .errors import BadBarrier
from .fences import Start
from .moves import address_of
from .program import Immediate, Sink
from .shared_memory import OPAQUE, RESERVED

SIZE = 8
LIMIT = (1 << 20) - 1  # of arrivals and of bytes
_SPACES = ("shared", "shared::cta", "shared::cluster")
_SCOPES = ("cta", "cluster")
_EACH = np.arange(SIZE)


class Mbarrier:
    """One barrier. ``phase`` counts phases; ``published`` is what a wait for an ended one teaches.
    ``start`` is how it was initialised, which fences.py asks for."""

    def __init__(self, machine, index: int, expected: int, start: Start):
        self.machine, self.index, self.expected = machine, index, expected
        self.start = start
        self.pending, self.transactions, self.phase = expected, 0, 0
        agents = machine.watch.agents
        self.gathering = Knowledge(np.zeros(agents, np.int32), np.zeros(agents, np.int32))
        self.published = Knowledge(np.zeros(agents, np.int32), np.zeros(agents, np.int32))
        self.waiters: list[np.ndarray] = []

    def __str__(self) -> str:
        return f"the mbarrier {_place(self.machine, self.index)}"

    def arrive(self, count: int) -> None:
        """``count`` arrivals."""
        if not 0 < count <= self.pending:
            raise BadBarrier(
                f"{count} arrivals at {self}, where phase {self.phase} expects {self.pending} more"
                f" of {self.expected}"
            )
        self.pending -= count
        self._end_phase()

    def expect(self, count: int) -> None:
        """``count`` bytes more are to come."""
        self._count(count)

    def complete(self, count: int) -> None:
        """``count`` bytes have come. They may come before they are expected."""
        self._count(-count)
        self._end_phase()

    def learn(self, agent: int, number: int) -> None:
        """A bulk load has come: the agent's work up to ``number`` is done."""
        self.gathering.clocks[agent] = max(int(self.gathering.clocks[agent]), number)

    def wait(self, threads: np.ndarray) -> None:
        """Threads wait for the phase's end."""
        self.waiters.append(threads)
        self.machine.wait(
            threads,
            f"{self} (phase {self.phase}: {self.pending} arrivals of {self.expected} and"
            f" {self.transactions} bytes are to come)",
        )

    def _count(self, count: int) -> None:
        self.transactions += count
        if abs(self.transactions) > LIMIT:
            raise BadBarrier(f"{self.transactions} bytes to come at {self}: the limit is {LIMIT}")

    def _end_phase(self) -> None:
        if self.pending or self.transactions > 0:
            return
        if self.transactions < 0:
            raise BadBarrier(
                f"all arrivals of phase {self.phase} have come at {self}, and {-self.transactions}"
                " bytes more than were expected"
            )
        self.phase += 1
        self.pending = self.expected
        self.published.join(self.gathering)
        waiters, self.waiters = self.waiters, []
        if waiters:
            self.machine.wake(np.concatenate(waiters))


def _place(machine, index: int) -> str:
    stride = machine.shared.stride
    return f"at {index % stride + RESERVED:#x} of block {index // stride} of the group"


def barrier_at(machine, index: int) -> Mbarrier:
    """The live barrier whose first byte has an index in shared memory."""
    barrier = machine.mbarriers.get(index)
    if barrier is None:
        raise BadBarrier(f"no mbarrier was initialised {_place(machine, index)}")
    if (machine.shared.written[index : index + SIZE] != OPAQUE).any():
        raise BadBarrier(f"{barrier} was overwritten")
    return barrier


def check_alive(machine, index: int) -> None:
    """BadBarrier where the block that an index belongs to has ended."""
    block = index // machine.shared.stride
    first = block * machine.block_threads
    if not machine.alive[first : first + machine.block_threads].any():
        raise BadBarrier(f"block {block} of the group has ended: its shared memory is gone")


def _locator(machine, operand, remote: bool):
    """A function from threads to the indices of the barriers that they name."""
    address, shared = address_of(machine, operand), machine.shared

    def locate(threads):
        blocks = machine.block_of[threads]
        index = shared.index(address(threads), blocks, SIZE)
        if not remote and (index // shared.stride != blocks).any():
            raise BadBarrier("the address of another block's mbarrier needs .shared::cluster")
        return index

    return locate


def _meetings(machine, index: np.ndarray, threads: np.ndarray):
    """(barrier, which of the threads name it), with the reads of its bytes watched: the barrier's
    initialisation must be known to the threads, and their use to who makes it invalid."""
    first = int(index[0])
    if (index == first).all():
        places = [(first, slice(None))]
    else:
        places = [(int(at), np.flatnonzero(index == at)) for at in np.unique(index)]
    for at, here in places:
        barrier = barrier_at(machine, at)
        warps = np.unique(machine.warp_of[threads[here]])
        machine.watch.read(np.broadcast_to(at + _EACH, (len(warps), SIZE)), warps)
        yield barrier, here, warps


def _numbers(machine, operand):
    """A function from threads to the values of an unsigned operand."""
    array = machine.registers.source(operand, "u32")
    return lambda threads: array[threads].astype(np.int64)


def _known(words: list[str], *sets: tuple[str, ...]) -> str | None:
    """The space where ``words`` are one of each of some sets, in their order, then a space.
    The sets may be left out."""
    for choice in sets:
        if words and words[0] in choice:
            words = words[1:]
    return words[0] if len(words) == 1 and words[0] in _SPACES else None


@opcode("mbarrier")
def build_mbarrier(machine, instruction):
    """``mbarrier.init|inval|arrive[.expect_tx]|expect_tx|complete_tx|test_wait|try_wait``"""
    operation, *words, type_ = instruction.modifiers
    builders = {
        "init": _build_init, "inval": _build_inval, "arrive": _build_arrive,
        "expect_tx": _build_count, "complete_tx": _build_count,
        "test_wait": _build_wait, "try_wait": _build_wait,
    }  # fmt: skip
    if operation not in builders or type_ != "b64":
        return None
    return builders[operation](machine, instruction, operation, words)


def _build_init(machine, instruction, operation, words):
    """``mbarrier.init.shared.b64 [address], count``: 9.7.13.15.9"""
    if _known(words) not in ("shared", "shared::cta"):
        return None
    a, count = instruction.operands
    locate, counts = _locator(machine, a, remote=False), _numbers(machine, count)

    def run(threads):
        numbers = machine.numbers[threads].tolist()
        for at, expected, thread in zip(locate(threads), counts(threads), numbers):
            _init(machine, int(at), int(expected), Start.now(machine, thread, instruction.place))

    return Step(run)


def _init(machine, index: int, expected: int, start: Start) -> None:
    if index in machine.mbarriers:
        raise BadBarrier(f"{machine.mbarriers[index]} is initialised again without inval")
    if not 0 < expected <= LIMIT:
        raise BadBarrier(f"an mbarrier cannot expect {expected} arrivals")
    machine.watch.write(index + _EACH[None], np.array([start.warp]))
    machine.shared.written[index : index + SIZE] = OPAQUE
    machine.shared.mbarriers += 1
    machine.mbarriers[index] = Mbarrier(machine, index, expected, start)


def _build_inval(machine, instruction, operation, words):
    """``mbarrier.inval.shared.b64 [address]``: 9.7.13.15.10"""
    if _known(words) not in ("shared", "shared::cta"):
        return None
    (a,) = instruction.operands
    locate = _locator(machine, a, remote=False)

    def run(threads):
        for at, warp in zip(locate(threads), machine.warp_of[threads]):
            barrier = barrier_at(machine, int(at))
            if barrier.waiters:
                raise BadBarrier(f"{barrier} is made invalid while threads wait for it")
            machine.watch.write(at + _EACH[None], np.array([warp]))
            machine.shared.written[at : at + SIZE] = 0
            machine.shared.mbarriers -= 1
            del machine.mbarriers[int(at)]

    return Step(run)


def _build_arrive(machine, instruction, operation, words):
    """``mbarrier.arrive[.release|.relaxed][.scope].space.b64 state|_, [address][, count]`` and
    ``mbarrier.arrive.expect_tx... state|_, [address], bytes``: 9.7.13.15.13"""
    expects = words[:1] == ["expect_tx"]
    space = _known(words[expects:], ("release", "relaxed"), _SCOPES)
    state, a, *rest = instruction.operands
    remote = space == "shared::cluster"
    if space is None or len(rest) > 1 or (expects and not rest):
        return None
    if remote and not isinstance(state, Sink):
        return None
    locate = _locator(machine, a, remote)
    number = _numbers(machine, rest[0] if rest else Immediate(1))
    result = None if isinstance(state, Sink) else machine.registers.result(state, "b64")
    relaxed = "relaxed" in words

    def run(threads):
        who, index, values = machine.numbers[threads], locate(threads), number(threads)
        counts, sizes = (np.ones_like(values), values) if expects else (values, None)
        for barrier, here, _ in _meetings(machine, index, who):
            if remote:
                check_alive(machine, barrier.index)
            phases = _arrivals(barrier, machine.warp_of[who[here]], counts[here],
                               None if sizes is None else sizes[here], relaxed)  # fmt: skip
            if result is not None:
                result[who[here]] = phases

    return Step(run)


def _arrivals(barrier, warps, counts, sizes, relaxed: bool) -> np.ndarray:
    """Threads arrive one after another; the phase that each arrived in."""
    phases, start = np.empty(len(warps), np.uint64), 0
    while start < len(warps):
        fitting = np.searchsorted(np.cumsum(counts[start:]), barrier.pending, "right")
        now = slice(start, start + max(1, int(fitting)))
        if not relaxed:
            for warp in np.unique(warps[now]):
                barrier.gathering.join(barrier.machine.watch.release(int(warp)))
        if sizes is not None:
            barrier.expect(int(sizes[now].sum()))
        phases[now] = barrier.phase
        barrier.arrive(int(counts[now].sum()))
        start = now.stop
    return phases


def _build_count(machine, instruction, operation, words):
    """``mbarrier.expect_tx|complete_tx[.relaxed][.scope].space.b64 [address], bytes``: 9.7.13.15.11"""
    space = _known(words, ("relaxed",), _SCOPES)
    if space is None:
        return None
    a, count = instruction.operands
    locate = _locator(machine, a, space == "shared::cluster")
    sizes = _numbers(machine, count)

    def run(threads):
        who, values = machine.numbers[threads], sizes(threads)
        for barrier, here, _ in _meetings(machine, locate(threads), who):
            total = int(values[here].sum())
            barrier.expect(total) if operation == "expect_tx" else barrier.complete(total)

    return Step(run)


def _build_wait(machine, instruction, operation, words):
    """``mbarrier.test_wait|try_wait[.parity][.acquire|.relaxed][.scope].shared.b64 done, [address],
    state|parity[, time]``: 9.7.13.15.16"""
    parity = words[:1] == ["parity"]
    space = _known(words[parity:], ("acquire", "relaxed"), _SCOPES)
    done, a, token, *rest = instruction.operands
    if space not in ("shared", "shared::cta") or len(rest) > (operation == "try_wait"):
        return None
    locate = _locator(machine, a, remote=False)
    result = machine.registers.result(done, "pred")
    tokens = machine.registers.source(token, "u32" if parity else "u64")
    ended = _parity_ended if parity else _state_ended
    relaxed, watch = "relaxed" in words, machine.watch

    def run(threads):
        who = machine.numbers[threads]
        for barrier, here, warps in _meetings(machine, locate(threads), who):
            mine = who[here]
            yes = ended(barrier, tokens[mine])
            passed = mine if yes.all() else mine[yes]
            if len(passed) < len(mine):
                barrier.wait(mine[~yes])
                warps = np.unique(machine.warp_of[passed])
            if len(passed):
                result[passed] = True
                if not relaxed:
                    for warp in warps:
                        watch.acquire(int(warp), barrier.published)
                machine.go_on(passed)

    return Step(run, CONTROL)


def _parity_ended(barrier: Mbarrier, parities: np.ndarray) -> np.ndarray:
    """Whether the phase of a parity has ended: the current one or the one before it."""
    if (parities > 1).any():
        raise BadBarrier(f"parity {int(parities.max())} of {barrier}: wanted 0 or 1")
    return parities != barrier.phase % 2


def _state_ended(barrier: Mbarrier, states: np.ndarray) -> np.ndarray:
    """Whether the phase of a state has ended: the current one or the one before it."""
    later = barrier.phase - states.astype(np.int64)
    if ((later < 0) | (later > 1)).any():
        raise BadBarrier(
            f"a state of phase {int(states[0])} of {barrier}, which is in phase {barrier.phase}"
        )
    return later == 1
