"""Jumps and ends."""

from .decode import CONTROL, Step, opcode


@opcode("bra")
def build_jump(machine, instruction):
    """``bra label``"""
    if instruction.modifiers not in ((), ("uni",)):
        return None
    target = machine.entry.labels[instruction.operands[0].name]
    return Step(lambda threads: machine.jump(threads, target), CONTROL)


@opcode("ret", "exit")
def build_end(machine, instruction):
    """``ret`` of a kernel, and ``exit``; that of a function is in calls.py"""
    if instruction.modifiers not in ((), ("uni",)) or instruction.operands:
        return None
    return Step(lambda threads: machine.end(machine.numbers[threads]), CONTROL)
