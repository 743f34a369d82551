"""Calls of functions: PTX ISA 9.7.12.5 (call) and 9.7.12.6 (ret).

A function has registers of its own, one set: it cannot call itself. Each thread has a memory for the
``.param`` variables that functions and calls declare. A call copies its arguments to the function's
parameters; ``ret`` copies the result to the caller's variable and goes back.
"""

import numpy as np

from .decode import CONTROL, Step, opcode
from .errors import BadAccess, Unsupported
from .functions import callee
from .program import Address, Symbol, Variable


class Calls:
    """What calls have passed, and where each thread that is in a function goes back to."""

    def __init__(self, machine):
        entry, threads = machine.entry, machine.threads
        self.variables = {variable.name: variable for variable in entry.passed}
        self.memory = np.zeros((threads, entry.passed_bytes), np.uint8)
        self.back = {name: np.zeros(threads, np.int32) for name in entry.functions}
        self.result = {name: np.zeros(threads, np.int64) for name in entry.functions}

    def reset(self) -> None:
        """As before the first instruction: what nobody passed has all bits set."""
        self.memory.fill(0xFF)

    def variable(self, operand) -> Variable | None:
        """The variable that an operand names."""
        return self.variables.get(operand.name) if isinstance(operand, Symbol) else None

    def place(self, a: Address, size: int) -> slice | None:
        """Where ``size`` bytes of a variable are in a thread's memory; None for another address."""
        found = self.variable(a.base)
        if found is None:
            return None
        if a.offset < 0 or a.offset + size > found.size or a.offset % size:
            last = a.offset + size
            raise BadAccess(f"bytes {a.offset} to {last} of {found.size} bytes of {_short(found)}")
        return slice(found.offset + a.offset, found.offset + a.offset + size)


def _short(variable: Variable) -> str:
    return variable.name.partition("@")[0]


def passed_reader(machine, a: Address, width: int, count: int):
    """A function from threads to (threads, count) unsigned elements of a ``.param`` variable."""
    here, memory = machine.calls.place(a, width * count), machine.calls.memory
    if here is None:
        return None
    return lambda threads: np.ascontiguousarray(memory[threads, here]).view(f"u{width}")


def passed_writer(machine, a: Address, width: int, count: int):
    """A function that writes (threads, count) unsigned elements of a ``.param`` variable."""
    here, memory = machine.calls.place(a, width * count), machine.calls.memory
    if here is None:
        return None

    def write(threads, values):
        memory[threads, here] = np.ascontiguousarray(values).view(np.uint8)

    return write


@opcode("call")
def build_call(machine, instruction):
    """``call[.uni] [(result),] name[, (arguments)]``"""
    if instruction.modifiers not in ((), ("uni",)):
        return None
    function = machine.entry.functions[callee(instruction)]
    at = next(n for n, o in enumerate(instruction.operands) if isinstance(o, Symbol))
    given = _variables(machine, instruction.operands[at + 1 :], function.parameters)
    result = _variables(machine, instruction.operands[:at], function.results)
    calls, name = machine.calls, function.name
    moves = [(_bytes(to), _bytes(source)) for to, source in zip(function.parameters, given)]

    def run(threads) -> None:
        for to, source in moves:
            calls.memory[threads, to] = calls.memory[threads, source]
        calls.back[name][threads] = machine.pc[threads] + 1
        if result:
            calls.result[name][threads] = result[0].offset
        machine.jump(threads, function.start)

    return Step(run, CONTROL)


def _variables(machine, lists, wanted: list[Variable]) -> list[Variable]:
    """The variables in a call's parentheses, which must be like those of the function."""
    found = [machine.calls.variable(item) for given in lists for item in given.items]
    if len(lists) > 1 or any(variable is None for variable in found):
        raise Unsupported("what a call passes is known in .param variables alone")
    if [v.size for v in found] != [v.size for v in wanted]:
        sizes, known = [v.size for v in found], [v.size for v in wanted]
        raise Unsupported(f"the call has variables of {sizes} bytes, the function of {known}")
    return found


def _bytes(variable: Variable) -> slice:
    return slice(variable.offset, variable.offset + variable.size)


@opcode("ret")
def build_return(machine, instruction):
    """``ret`` of a function, which the parser has given the function's name"""
    if instruction.modifiers not in ((), ("uni",)) or not instruction.operands:
        return None
    function, calls = machine.entry.functions[instruction.operands[0].name], machine.calls
    back, result = calls.back[function.name], calls.result[function.name]

    def run(threads) -> None:
        for variable in function.results:
            who = machine.numbers[threads]
            to = result[who][:, None] + np.arange(variable.size)
            calls.memory[who[:, None], to] = calls.memory[who, _bytes(variable)]
        machine.jump(threads, back[threads])

    return Step(run, CONTROL)
