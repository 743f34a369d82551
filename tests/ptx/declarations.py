"""What an entry declares: its parameters and its variables in shared memory; and whether each name
that it uses is one."""

from .errors import Unsupported
from .functions import Part
from .program import SIZES, Address, Entry, Instruction, Operand, Pair, Symbol, Variable, Vector
from .tokens import Tokens

_OF_OTHERS = ("call", "ret", "brx")  # their operands are names of other things


def known_type(word: str, tokens: Tokens) -> str:
    """The type of a word such as ``.b32``."""
    if word[1:] not in SIZES:
        raise Unsupported(f"PTX line {tokens.line}: type {word!r} is not known")
    return word[1:]


def read_shared(tokens: Tokens, entry: Entry) -> None:
    """``.extern .shared .align 16 .b8 name[];`` or ``.shared .align 8 .b8 name[64];``"""
    align, type_, external = 1, "b8", False
    while (word := tokens.next()).startswith("."):
        if word == ".extern":
            external = True
        elif word == ".align":
            align = tokens.whole()
        elif word != ".shared":
            type_ = known_type(word, tokens)
    count = 1
    if tokens.peek() == "[":
        tokens.next()
        count = 0 if tokens.peek() == "]" else tokens.whole()
        tokens.expect("]")
    tokens.expect(";")
    if external or count == 0:
        entry.dynamic, entry.dynamic_align = word, max(align, 16)
        return
    align = max(align, SIZES[type_])
    offset = -(-entry.static_bytes // align) * align
    entry.shared.append(Variable(word, SIZES[type_] * count, align, offset))


def read_parameter(tokens: Tokens, offset: int = 0) -> Variable:
    """``.param .u64 .ptr .global .align 1 name`` or ``.param .align 64 .b8 name[128]``, at the first
    place from ``offset`` on."""
    tokens.expect(".param")
    align, type_, pointer = 1, "b8", False
    while (word := tokens.next()).startswith("."):
        pointer = pointer or word == ".ptr"
        if word == ".align":
            given = tokens.whole()
            align = align if pointer else given  # after .ptr: of what it points to
        elif word[1:] in SIZES:
            type_ = word[1:]
    size = SIZES[type_]
    align = max(align, size) if tokens.peek() != "[" else align
    if tokens.peek() == "[":
        tokens.next()
        size *= tokens.whole()
        tokens.expect("]")
    return Variable(word, size, align, -(-offset // align) * align)


def read_parameters(tokens: Tokens) -> list[Variable]:
    """Parameters in parentheses, one after another in memory."""
    found: list[Variable] = []
    tokens.expect("(")
    while tokens.peek() != ")":
        found.append(read_parameter(tokens, found[-1].offset + found[-1].size if found else 0))
        if tokens.peek() == ",":
            tokens.next()
    tokens.next()
    return found


def check_names(entry: Entry, part: Part) -> None:
    """Unsupported where an entry, or a function that it calls, uses a name that it does not declare."""
    own = part.function.name if part.function else entry.name
    if not part.code:
        raise Unsupported(f"{own} has no instruction")
    passed = [v.name for v in entry.passed if part.function is None or v.name.endswith(f"@{own}")]
    parameters = [] if part.function else [v.name for v in entry.parameters]
    variables = {*passed, *parameters, *(v.name for v in entry.shared), entry.dynamic}
    for instruction in part.code:
        _check_names(part, instruction, variables)


def _check_names(part: Part, instruction: Instruction, variables: set[str | None]) -> None:
    """Unsupported where a name is not declared."""
    guard = instruction.guard
    if guard is not None and part.registers.get(guard.name) != "pred":
        raise Unsupported(f"the guard {guard.name!r} is no predicate", instruction)
    if instruction.root == "bra":
        for operand in instruction.operands:
            if getattr(operand, "name", "") not in part.labels:
                name = getattr(operand, "name", operand)
                raise Unsupported(f"no label {name!r}", instruction)
        return
    for operand in instruction.operands if instruction.root not in _OF_OTHERS else ():
        for name in _symbols(operand):
            if name not in variables:
                kind = "register" if name.startswith("%") else "name"
                raise Unsupported(f"{kind} {name!r} is not known", instruction)


def _symbols(operand: Operand) -> list[str]:
    """The names of variables in an operand."""
    if isinstance(operand, Symbol):
        return [operand.name]
    parts = {Address: lambda a: (a.base, *a.coordinates), Vector: lambda v: v.items,
             Pair: lambda p: (p.first, p.second)}.get(type(operand))  # fmt: skip
    return [name for part in (parts(operand) if parts else ()) for name in _symbols(part)]
