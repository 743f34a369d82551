"""atom and red on global and shared memory: PTX ISA 9.7.13.5 and 9.7.13.7.

Threads with one address take turns, the lowest first. Order and scope are accepted: the machine
executes one instruction after another. Against plain accesses to shared memory an atomic one counts
as a read: a plain read after it that no barrier orders is not found.
"""

import numpy as np

from .decode import Step, opcode
from .floats import flushing
from .halves import HALVES, of_bits, pairs
from .moves import address_of
from .program import SIZES, Sink
from .registers import DTYPES

_ORDERS = {"relaxed", "acquire", "release", "acq_rel"}
_SCOPES = {"cta", "cluster", "gpu", "sys"}
_SHARED = {"shared", "shared::cta", "shared::cluster"}
_BITS = ("b32", "b64")
_INTEGERS = ("u32", "s32", "u64", "s64")


def _increment(old, limit):
    return np.where(old >= limit, 0, old + np.uint32(1))


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - np.uint32(1))


_OPERATIONS = {  # (function of what is there and the operand, types)
    "add": (np.add, ("u32", "s32", "u64", "f32", "f64")),
    "min": (np.minimum, _INTEGERS), "max": (np.maximum, _INTEGERS),
    "and": (np.bitwise_and, _BITS), "or": (np.bitwise_or, _BITS), "xor": (np.bitwise_xor, _BITS),
    "exch": (lambda old, new: new, _BITS),
    "inc": (_increment, ("u32",)), "dec": (_decrement, ("u32",)),
    "cas": (lambda old, wanted, new: np.where(old == wanted, new, old), ("b16", *_BITS)),
}  # fmt: skip


def _form(instruction):
    """(space, function, type) of an atomic operation, or None."""
    *modifiers, type_ = instruction.modifiers
    left = [m for m in modifiers if m not in _ORDERS | _SCOPES]
    if len(modifiers) - len(left) > 2 or len(left) not in (2, 3):
        return None
    space, operation, *more = left
    if space not in _SHARED | {"global"} or operation not in _OPERATIONS:
        return None
    if type_ in HALVES:
        if operation != "add" or more != ["noftz"]:
            return None
        function = of_bits(np.add, HALVES[type_], set())
        packed = type_.endswith("x2")
        return space, pairs(function) if packed else function, "b32" if packed else "b16"
    function, types = _OPERATIONS[operation]
    if type_ not in types or more:
        return None
    if type_ == "f32" and space == "global":  # there it flushes subnormal numbers
        function = flushing(function)
    return space, function, type_


def rounds(addresses: np.ndarray) -> list[np.ndarray]:
    """Which threads (indices) take part in each turn: in one turn each address is there once."""
    order = np.argsort(addresses, kind="stable")
    ordered = addresses[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]]
    starts = np.flatnonzero(new)
    turn = np.arange(len(order)) - starts[np.cumsum(new) - 1]
    return [order[turn == n] for n in range(int(turn.max()) + 1)]


@opcode("atom", "red")
def build_atomic(machine, instruction):
    """``atom[.order][.scope].space.op.type d, [a], b[, c]`` and ``red`` without d"""
    form = _form(instruction)
    if form is None:
        return None
    space, function, type_ = form
    operands = list(instruction.operands)
    result = None
    if instruction.root == "atom":
        d = operands.pop(0)
        result = None if isinstance(d, Sink) else machine.registers.result(d, type_)
    wanted = 3 if "cas" in instruction.modifiers else 2
    if len(operands) != wanted or (wanted == 3 and instruction.root == "red"):
        return None
    address = address_of(machine, operands[0])
    sources = [machine.registers.source(operand, type_) for operand in operands[1:]]
    change = (_in_shared if space in _SHARED else _in_global)(machine, SIZES[type_])

    def run(threads):
        where, given = address(threads), [source[threads] for source in sources]
        found = np.empty(len(where), DTYPES[type_])

        def update(turn, unsigned):
            found[turn] = old = np.ascontiguousarray(unsigned).view(DTYPES[type_])
            new = function(old, *(values[turn] for values in given))
            return np.ascontiguousarray(new, DTYPES[type_]).view(unsigned.dtype)

        change(threads, where, update)
        if result is not None:
            result[threads] = found

    return Step(run)


def _in_global(machine, width: int):
    """A function that applies ``update`` to the elements at addresses in global memory."""
    memory = machine.memory

    def change(threads, where, update):
        warps = machine.warp_of[threads]
        machine.counts.global_access(where, width, warps, True)
        machine.counts.global_access(where, width, warps, False)
        for turn in rounds(where):
            at = where[turn]
            memory.store(at, width, update(turn, memory.load(at, width, 1)[:, 0])[:, None])

    return change


def _in_shared(machine, width: int):
    """The same in shared memory."""
    shared = machine.shared

    def change(threads, where, update):
        warps = machine.warp_of[threads]
        machine.counts.shared_access(where, width, warps)
        index = shared.index(where, machine.block_of[threads], width)
        for turn in rounds(index):
            at = index[turn]
            values = shared.load(at, width, 1, warps[turn])[:, 0]
            shared.put(at, width, update(turn, values)[:, None])

    return change
