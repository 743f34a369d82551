"""The functions of a text, ``.func``, as a part of the code of the entry that calls them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import Unsupported
from .program import Entry, Function, Instruction, Symbol, Vector

_FUNCTION = re.compile(r"\.func\b\s*(?:\([^)]*\)\s*)?([\w$]+)[^;{]*([;{])")
_ENDS = ("ret", "exit", "bra")


@dataclass
class Part:
    """The code of an entry, or of a function, as it was read: labels count from its start."""

    function: Function | None = None
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)


def definitions(text: str) -> dict[str, int]:
    """Where each function begins that has a body."""
    return {m.group(1): m.start() for m in _FUNCTION.finditer(text) if m.group(2) == "{"}


def callee(call: Instruction) -> str:
    """The function that a ``call`` names."""
    rest = [operand for operand in call.operands if not isinstance(operand, Vector)]
    if len(rest) != 1 or not isinstance(rest[0], Symbol):
        raise Unsupported("an indirect call is not known", call)
    return rest[0].name


def link(entry: Entry, main: Part, read: Callable[[str], Part | None]) -> None:
    """Give an entry its code, with each function before those that call it: the machine executes
    the lowest instruction first, so those that call are back before the others go on."""

    def place(part: Part, callers: tuple[str, ...]) -> None:
        for call in (i for i in part.code if i.root == "call"):
            name = callee(call)
            if name in callers:
                raise Unsupported(f"function {name!r} calls itself: recursion is not known", call)
            if name in entry.functions:
                continue
            found = read(name)
            if found is None:
                raise Unsupported(f"function {name!r} has no body in this text", call)
            place(found, (*callers, name))
        start = len(entry.code)
        entry.code += part.code
        entry.registers |= part.registers
        entry.labels |= {name: start + pc for name, pc in part.labels.items()}
        if part.function is None:
            entry.start = start
            return
        _check_end(part.function.name, part.code[-1])
        part.function.start = start
        entry.functions[part.function.name] = part.function

    place(main, ())


def _check_end(name: str, last: Instruction) -> None:
    """Unsupported where the last instruction of a function may go on to what is behind it."""
    if last.root not in _ENDS or last.guard is not None:
        raise Unsupported(f"function {name!r} goes on behind its last instruction", last)
