"""What a PTX text says, as data: entries, instructions, operands."""

import functools
from dataclasses import dataclass, field

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
         "b32": 4, "u32": 4, "s32": 4, "f32": 4, "tf32": 4, "f16x2": 4, "bf16x2": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A register, by its unique name: one of an inner scope has the scope's number in it."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number in the text: an int, or a float of ``0f...`` and ``0d...``."""

    value: int | float


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; with coordinates ``[base, {x, y}]``."""

    base: "Operand"
    offset: int = 0
    coordinates: tuple["Operand", ...] = ()


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two results of one instruction."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True)
class Sink:
    """``_``: a result that nobody wants."""


Operand = Register | Immediate | Symbol | Special | Address | Vector | Pair | Sink


@dataclass(frozen=True)
class Place:
    """Where an instruction is: its line of PTX and, from ``.loc``, its line of source."""

    line: int
    file: str = ""
    source: int = 0

    def __str__(self) -> str:
        return f"PTX line {self.line}" + (f" ({self.file}:{self.source})" if self.file else "")


@dataclass(frozen=True)
class Instruction:
    """``@guard root.modifiers operands;``"""

    root: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    place: Place
    text: str
    guard: Register | None = None
    negated: bool = False

    @property
    def opcode(self) -> str:
        return ".".join((self.root, *self.modifiers))

    @property
    def type(self) -> str:
        """The last modifier, which is the type of most instructions."""
        return self.modifiers[-1]


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable in shared memory: type ``b8`` with a count is bytes."""

    name: str
    size: int
    align: int
    offset: int = 0


@dataclass
class Function:
    """A ``.func``, whose code is in the entry's from ``start`` on. Its parameters and its result are
    variables of ``Entry.passed``."""

    name: str
    parameters: list[Variable] = field(default_factory=list)
    results: list[Variable] = field(default_factory=list)
    start: int = 0


@dataclass
class Entry:
    """One kernel: ``registers`` maps each name to its declared type, ``labels`` to a pc. The code of
    the functions that it calls comes before its own, which begins at ``start``."""

    name: str
    target: str
    parameters: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    shared: list[Variable] = field(default_factory=list)
    dynamic: str | None = None  # the name of the shared memory whose size a launch says
    dynamic_align: int = 16
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    block: tuple[int, int, int] | None = None  # of .reqntid
    most_registers: int = 0  # of .maxnreg
    start: int = 0
    functions: dict[str, Function] = field(default_factory=dict)
    passed: list[Variable] = field(default_factory=list)  # .param variables, a thread's own

    @functools.cached_property
    def uses_tensor_maps(self) -> bool:
        """Whether it has copies by tensor maps."""
        return any(i.root == "cp" and "tensor" in i.modifiers for i in self.code)

    @property
    def static_bytes(self) -> int:
        """The shared memory of the variables."""
        return max((v.offset + v.size for v in self.shared), default=0)

    @property
    def dynamic_offset(self) -> int:
        """Where the dynamic shared memory begins, after the variables."""
        return -(-self.static_bytes // self.dynamic_align) * self.dynamic_align

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)

    @property
    def passed_bytes(self) -> int:
        """The memory of each thread for what calls pass."""
        return max((v.offset + v.size for v in self.passed), default=0)
