"""What the machine says when a program does what a GPU would not do, or not reliably."""

from .program import Instruction


class MachineError(Exception):
    """A fault of the program, with the instruction that has it."""

    def __init__(self, message: str, instruction: Instruction | None = None):
        self.instruction = instruction
        where = f"{instruction.place}: {instruction.text}\n  " if instruction else ""
        super().__init__(where + message)


class Unsupported(MachineError):
    """A target, an opcode or a modifier that the machine does not know."""


class BadAccess(MachineError):
    """An access outside an allocation, a misaligned one, or a read of memory that nobody wrote."""


class Race(MachineError):
    """Two accesses to the same shared bytes, one of them a write, in no order."""


class Deadlock(MachineError):
    """No thread can go on, or the limit of instructions was reached."""


class BadBarrier(MachineError):
    """A barrier that is used against its rules."""
