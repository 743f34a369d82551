"""Moves, loads and stores: PTX ISA 9.7.9. Global and shared memory, and the parameters."""

import numpy as np

from .calls import passed_reader, passed_writer
from .decode import Step, opcode
from .errors import BadAccess, Unsupported
from .program import SIZES, Address, Immediate, Register, Special, Symbol, Vector
from .registers import DTYPES
from .specials import special

PARAMETERS = 1 << 56  # generic addresses of the parameter memory
_IGNORED = {"relaxed", "volatile", "weak", "nc", "cta", "gpu", "sys"}


def address_of(machine, operand: Address):
    """A function from threads to the addresses (int64) of ``[base + offset]``."""
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        size = SIZES[machine.entry.registers[base.name]]
        array = machine.registers.view(base.name, "s64" if size == 8 else "u32")
        return lambda threads: array[threads].astype(np.int64) + offset
    known = isinstance(base, Immediate)
    start = base.value if known else symbol_address(machine, base.name)
    constant = np.full(machine.threads, start + offset, np.int64)
    return lambda threads: constant[threads]


def symbol_address(machine, name: str) -> int:
    """The address of a variable in shared memory, or of a parameter."""
    found = machine.symbol(name)
    if found is None:
        found = PARAMETERS + parameter_offset(machine, name)
    return found


def parameter_offset(machine, name: str) -> int:
    for parameter in machine.entry.parameters:
        if parameter.name == name:
            return parameter.offset
    raise Unsupported(f"{name} is no parameter")


@opcode("mov")
def build_move(machine, instruction):
    """``mov.type d, a``; ``mov.b64 {low, high}, a`` and the other way round"""
    if len(instruction.modifiers) != 1:
        return None
    type_ = instruction.type
    d, a = instruction.operands
    if isinstance(d, Vector):
        return _unpack(machine, d.items, a, type_)
    if isinstance(a, Vector):
        return _pack(machine, d, a.items, type_)
    result = machine.registers.result(d, type_)
    if isinstance(a, Special):
        source = special(machine, a.name)
    elif isinstance(a, Symbol):
        source = np.full(machine.threads, symbol_address(machine, a.name), np.uint64).astype(
            DTYPES[type_]
        )
    else:
        source = machine.registers.source(a, type_)

    def run(threads):
        result[threads] = source[threads]

    return Step(run)


def _parts(machine, items, type_: str) -> list[str]:
    """The types of the parts of a packed register."""
    return [f"b{8 * SIZES[type_] // len(items)}"] * len(items)


def _unpack(machine, items, a, type_):
    registers = machine.registers
    kinds = _parts(machine, items, type_)
    source = registers.source(a, type_)
    results = [
        registers.result(item, kind) if isinstance(item, Register) else None
        for item, kind in zip(items, kinds)
    ]
    part = DTYPES[kinds[0]]

    def run(threads):
        pieces = np.ascontiguousarray(source[threads]).view(part).reshape(-1, len(results))
        for n, result in enumerate(results):
            if result is not None:
                result[threads] = pieces[:, n]

    return Step(run)


def _pack(machine, d, items, type_):
    registers = machine.registers
    kinds = _parts(machine, items, type_)
    result = registers.result(d, type_)
    sources = [registers.source(item, kind) for item, kind in zip(items, kinds)]

    def run(threads):
        pieces = np.stack([source[threads] for source in sources], axis=1)
        result[threads] = np.ascontiguousarray(pieces).view(result.dtype)[:, 0]

    return Step(run)


@opcode("createpolicy")
def build_policy(machine, instruction):
    """``createpolicy.fractional.L2::evict_first.b64 d, fraction``: only hints to caches use it"""
    kind, *_ = instruction.modifiers
    if kind != "fractional" or instruction.type != "b64":
        return None
    result = machine.registers.result(instruction.operands[0], "b64")

    def run(threads):
        result[threads] = 0

    return Step(run)


@opcode("cvta")
def build_generic(machine, instruction):
    """``cvta[.to].space.u64 d, a``: global and parameter addresses are their own generic ones"""
    space = [m for m in instruction.modifiers[:-1] if m != "to"]
    if space not in (["global"], ["param"]) or instruction.type != "u64":
        return None
    d, a = instruction.operands
    result = machine.registers.result(d, "u64")
    if isinstance(a, Symbol):
        source = machine.registers.constant(symbol_address(machine, a.name), "u64")
    else:
        source = machine.registers.source(a, "u64")

    def run(threads):
        result[threads] = source[threads]

    return Step(run)


def _without_hint(instruction) -> tuple:
    """The operands of a load or store without its cache policy, which changes no value."""
    hinted = "L2::cache_hint" in instruction.modifiers
    return instruction.operands[:-1] if hinted else instruction.operands


def _form(instruction):
    """(space, how many elements, type) of a load or store, or None where it has other modifiers."""
    *modifiers, type_ = [m for m in instruction.modifiers if m not in _IGNORED]
    count = 1
    if modifiers and modifiers[-1] in ("v2", "v4", "v8"):
        count = int(modifiers.pop()[1:])
    modifiers = [m for m in modifiers if not m.startswith(("L1::", "L2::"))]
    if len(modifiers) != 1 or type_ not in DTYPES or type_ == "pred":
        return None
    return modifiers[0], count, type_


@opcode("ld")
def build_load(machine, instruction):
    """``ld.space[.vN].type d, [a]``; a wider register gets the value extended"""
    form = _form(instruction)
    if form is None:
        return None
    space, count, type_ = form
    d, a = _without_hint(instruction)
    items = d.items if isinstance(d, Vector) else (d,)
    if len(items) != count:
        return None
    results = [machine.registers.wide_result(item, type_) for item in items]
    if space == "param" and machine.calls.variable(a.base) is None:
        return _parameter(machine, a, results, type_)
    read = reader(machine, space, a, SIZES[type_], count)
    if read is None:
        return None

    def run(threads):
        values = read(threads)
        for n, result in enumerate(results):
            result[threads] = values[:, n].view(DTYPES[type_]) if count == 1 else values[:, n].astype(
                values.dtype).view(DTYPES[type_])  # fmt: skip

    return Step(run)


def _parameter(machine, a: Address, results, type_):
    start = parameter_offset(machine, a.base.name) + a.offset
    size = SIZES[type_]
    end = start + size * len(results)
    if start < 0 or end > machine.entry.parameter_bytes or start % (size * len(results)):
        raise BadAccess(
            f"bytes {start} to {end} of {machine.entry.parameter_bytes} bytes of parameters"
        )
    memory = machine.parameters

    def run(threads):
        for n, result in enumerate(results):
            at = start + n * size
            result[threads] = memory[at : at + size].view(DTYPES[type_])[0]

    return Step(run)


def _places(machine, space: str, a: Address, size: int, load: bool):
    """The memory of a space, and a function from threads to their places in it and who they are
    there; None for another space."""
    address = address_of(machine, a)
    if space == "global":

        def find(threads):
            where = address(threads)
            machine.counts.global_access(where, size, machine.warp_of[threads], load)
            return where, ()

        return machine.memory, find
    if space not in ("shared", "shared::cta", "shared::cluster"):
        return None
    shared = machine.shared

    def find_shared(threads):
        where, warps = address(threads), machine.warp_of[threads]
        machine.counts.shared_access(where, size, warps)
        return shared.index(where, machine.block_of[threads], size), (warps,)

    return shared, find_shared


def reader(machine, space: str, a: Address, width: int, count: int):
    """A function from threads to (threads, count) unsigned elements, or None for another space."""
    if space == "param":
        return passed_reader(machine, a, width, count)
    found = _places(machine, space, a, width * count, True)
    if found is None:
        return None
    memory, find = found

    def read(threads):
        places, agents = find(threads)
        return memory.load(places, width, count, *agents)

    return read


@opcode("st")
def build_store(machine, instruction):
    """``st.space[.vN].type [a], b``; of a wider register the low part"""
    form = _form(instruction)
    if form is None:
        return None
    space, count, type_ = form
    a, b = _without_hint(instruction)
    items = b.items if isinstance(b, Vector) else (b,)
    if len(items) != count:
        return None
    width = SIZES[type_]
    unsigned = f"u{width}"
    sources = [machine.registers.source(item, type_) for item in items]
    write = writer(machine, space, a, width, count)
    if write is None:
        return None

    def run(threads):
        values = np.stack(
            [np.ascontiguousarray(s[threads]).view(unsigned) for s in sources], axis=1
        )
        write(threads, values)

    return Step(run)


def writer(machine, space: str, a: Address, width: int, count: int):
    """A function that writes (threads, count) unsigned elements, or None for another space."""
    if space == "param":
        return passed_writer(machine, a, width, count)
    found = _places(machine, space, a, width * count, False)
    if found is None:
        return None
    memory, find = found

    def write(threads, values):
        places, agents = find(threads)
        memory.store(places, width, values, *agents)

    return write
