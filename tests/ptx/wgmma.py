"""Products of a warpgroup: PTX ISA 9.7.15, ``wgmma`` of sm_90a.

A warpgroup is four warps of a block, from a multiple of four. All four execute each instruction
together: those that come first wait for the others. A product reads its tiles, A's registers and
the accumulators when it is done: at once, or in mode late at the ``wait_group`` that it is for.

Checks: between its issue and its wait nobody else may write a product's registers; what it reads
from registers must have been there at the last ``wgmma.fence``. The values at that fence are kept
and compared, for the products that stand between a fence and the next one in the text; what a
``mov`` between writes is not compared. That a register is *read* before the wait shows in the
results of the two modes.
"""

from functools import partial

import numpy as np

from .clocks import PRODUCT
from .decode import CONTROL, TOGETHER, Step, opcode
from .errors import Race
from .program import Register, Vector
from .registers import active
from .wgmma_products import GROUP, WARPS, Issue, Multiply, Product, watched

_CHANGED = "was written while a wgmma that nobody waited for uses it"
_UNFENCED = "was written after the last wgmma.fence"


@opcode("wgmma")
def build_wgmma(machine, instruction):
    """``fence``, ``commit_group``, ``wait_group N`` and ``mma_async``, all ``.sync.aligned``."""
    what, *rest = instruction.modifiers
    if rest[:2] != ["sync", "aligned"]:
        return None
    if what == "mma_async":
        multiply = Multiply.of(machine, instruction, rest[2:])
        return None if multiply is None else _together(machine, partial(_multiply, multiply))
    if rest[2:] or len(instruction.operands) != (what == "wait_group"):
        return None
    if what == "fence":
        return _together(machine, Fence(machine, instruction).run)
    if what == "commit_group":
        return _together(machine, partial(_commit, machine))
    if what == "wait_group":
        return _together(machine, partial(_wait, machine, int(instruction.operands[0].value)))
    return None


# ---- warpgroups


def _together(machine, act) -> Step:
    """A step for whole warpgroups: ``act`` gets the first threads (n,) of each."""
    numbers = machine.numbers
    leaders = numbers - numbers % machine.block_threads % GROUP

    def run(threads):
        mine = numbers[threads]
        first, last = mine[::GROUP], mine[GROUP - 1 :: GROUP]
        if len(first) != len(last) or (leaders[first] != first).any() or (
            last - first != GROUP - 1
        ).any():  # fmt: skip
            mine = _arrived(machine, mine, leaders)
            first = mine[::GROUP]
        if len(mine):
            act(first)
            machine.go_on(active(mine))

    return Step(run, TOGETHER | CONTROL)


def _arrived(machine, mine: np.ndarray, leaders: np.ndarray) -> np.ndarray:
    """Warps wait for the rest of their warpgroup; the threads of those that are complete now."""
    key = ("wgmma waits", int(machine.pc[mine[0]]))
    here = machine.states.setdefault(key, np.zeros(machine.threads, bool))
    here[mine] = True
    machine.wait(mine, "the rest of its warpgroup")
    waiting = np.flatnonzero(here)
    counts = np.bincount(leaders[waiting], minlength=machine.threads)
    done = waiting[counts[leaders[waiting]] == GROUP]
    if len(done):
        here[done] = False
        machine.wake(done)
    return done


class State:
    """A warpgroup's last fence, and its products that nobody waited for yet."""

    def __init__(self):
        self.fence: Fence | None = None
        self.flying: list[Product] = []


def _state(machine, leader: int) -> State:
    key = ("wgmma", leader)
    if key not in machine.states:
        machine.states[key] = State()
    return machine.states[key]


def _runs(leaders: np.ndarray) -> list[np.ndarray]:
    """The warpgroups, parted where one does not follow another."""
    return np.split(leaders, np.flatnonzero(np.diff(leaders) != GROUP) + 1)


def _check_flying(products: list[Product]) -> None:
    """Race where a register of a warpgroup's products has changed."""
    seen = set()
    for product in products:
        accumulators = product.issue.multiply.d_names
        place = slice(product.place, product.place + 1)
        product.issue.check(place, _CHANGED, accumulators not in seen)
        seen.add(accumulators)


# ---- instructions


class Fence:
    """``wgmma.fence``: keeps the registers of the products that follow it in the text. ``covers``
    maps each of them to the registers that a ``mov`` between writes, or None. LLVM puts copies
    of accumulators there, which ptxas makes vanish."""

    def __init__(self, machine, instruction):
        self.machine, self.instruction = machine, instruction
        self.covers: dict[int, object] = {}
        names = self._following()
        self.rows = machine.registers.rows(names, 4) if names else None

    def _following(self) -> tuple[str, ...]:
        """The names of the registers of the products up to the next fence."""
        code = self.machine.entry.code
        at = next(n for n, other in enumerate(code) if other is self.instruction) + 1
        names, moved = {}, set()  # names: of the products so far, whose registers are in use
        while at < len(code) and code[at].opcode != self.instruction.opcode:
            found, at = code[at], at + 1
            if found.root == "mov" and isinstance(found.operands[0], Register):
                moved.add(found.operands[0].name)
            if found.opcode.startswith("wgmma.mma_async"):
                vectors = [each for each in found.operands[:2] if isinstance(each, Vector)]
                mine = dict.fromkeys(item.name for each in vectors for item in each.items)
                copied = tuple(name for name in mine if name in moved and name not in names)
                names.update(mine)
                rows = self.machine.registers.rows
                self.covers[id(found)] = rows(copied, 4) if copied else None
        return tuple(names)

    def run(self, leaders: np.ndarray) -> None:
        """The registers are now as products may find them."""
        for leader in leaders.tolist():
            state = _state(self.machine, leader)
            state.fence = self
            _check_flying(state.flying)
        if self.rows is not None:
            for run in _runs(leaders):
                threads = slice(int(run[0]), int(run[-1]) + GROUP)
                watched(self.machine).keep(self.rows, threads)


def _multiply(multiply: Multiply, leaders: np.ndarray) -> None:
    """``mma_async``: start the products, and note them for the next commit."""
    machine = multiply.machine
    for run in _runs(leaders):
        states = [_state(machine, leader) for leader in run.tolist()]
        _check_fences(multiply, states, int(run[0]))
        products = multiply.issue(int(run[0]), len(run))
        for leader, state, product in zip(run.tolist(), states, products):
            state.flying.append(product)
            machine.asynchronous.start(product, ("wgmma", leader))


def _check_fences(multiply: Multiply, states: list[State], first: int) -> None:
    """Race where registers that the products read were written after the fence, or without one."""
    if any(state.fence is None for state in states):
        raise Race("no wgmma.fence before the first wgmma.mma_async")
    common, key = watched(multiply.machine), id(multiply.instruction)
    if all(key in state.fence.covers for state in states):
        threads = slice(first, first + len(states) * GROUP)
        _check_kept(common, multiply, states[0].fence.covers[key], threads)
        return
    for n, state in enumerate(states):
        threads = slice(first + n * GROUP, first + (n + 1) * GROUP)
        if key in state.fence.covers:
            _check_kept(common, multiply, state.fence.covers[key], threads)
            continue
        common.keep(multiply.d_rows, threads)
        if multiply.a_names:
            common.keep(multiply.a_rows, threads)


def _check_kept(common, multiply: Multiply, moved, threads: slice) -> None:
    """Race where a register is not as it was at the fence; ``moved``: those that may not be."""
    if moved is not None:
        common.keep(moved, threads)
    if multiply.scale_d[threads].any():
        common.check(multiply.d_rows, multiply.d_names, threads, _UNFENCED)
    else:
        common.keep(multiply.d_rows, threads)
    if multiply.a_names:
        common.check(multiply.a_rows, multiply.a_names, threads, _UNFENCED)


def _commit(machine, leaders: np.ndarray) -> None:
    """``commit_group``: what was started since the last one is the newest group."""
    for leader in leaders.tolist():
        machine.asynchronous.commit(("wgmma", leader))


def _wait(machine, left: int, leaders: np.ndarray) -> None:
    """``wait_group N``: all groups but the newest N are done."""
    waited = {leader: _due(machine, leader, left) for leader in leaders.tolist()}
    for products in waited.values():
        _check_flying(products)
    if machine.mode.late:
        _finish([list(products) for products in waited.values()])
    for leader, products in waited.items():
        machine.asynchronous.wait(("wgmma", leader), left)
        if products:
            state, warp = _state(machine, leader), leader // 32
            state.flying = [each for each in state.flying if each not in products]
            agent = machine.watch.agent(warp, PRODUCT)
            for each in range(warp, warp + WARPS):
                machine.watch.learn(each, agent, products[-1].number)


def _due(machine, leader: int, left: int) -> list[Product]:
    """The products of a warpgroup's groups but the newest ``left``, oldest first."""
    groups = machine.asynchronous.groups.get(("wgmma", leader), [])
    return [product for group in groups[: max(0, len(groups) - left)] for product in group]


def _finish(queues: list[list[Product]]) -> None:
    """Do all products, those of one issue together, each warpgroup's in order."""
    while any(queues):
        heads = [queue[0] for queue in queues if queue]
        issue: Issue = heads[0].issue
        places = sorted(head.place for head in heads if head.issue is issue)
        together = places == list(range(places[0], places[-1] + 1))
        chosen = set(places) if together else {places[0]}
        issue.compute(slice(places[0], max(chosen) + 1))
        for queue in queues:
            if queue and queue[0].issue is issue and queue[0].place in chosen:
                queue.pop(0).done = True
