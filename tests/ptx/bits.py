"""Fields, bytes and counts of bits: PTX ISA 9.7.1, 9.7.8, 9.7.9.7."""

import numpy as np

from .arithmetic import elementwise
from .decode import Step, opcode
from .program import SIZES, Immediate
from .registers import DTYPES

_32, _ZERO, _ONE = np.uint64(32), np.uint64(0), np.uint64(1)


def _field(a, position, length, signed: bool):
    """``length`` bits of a from ``position``; above them zeros or the sign, as bfe has it."""
    bits = 8 * a.dtype.itemsize
    wide = a.astype(np.int64 if signed else np.uint64)
    unsigned = wide.view(np.uint64)
    kept = np.clip(np.minimum(length, bits - position), 0, 64)
    shift = np.minimum(position, 63).astype(np.uint64)
    mask = np.where(kept >= 64, ~_ZERO, (_ONE << np.minimum(kept, 63).astype(np.uint64)) - _ONE)
    field = np.where(position >= bits, _ZERO, unsigned >> shift) & mask
    if signed:
        top = np.clip(position + length - 1, 0, bits - 1).astype(np.uint64)
        negative = (unsigned >> top & _ONE > 0) & (length > 0)
        field = np.where(negative, field | ~mask, field)
    return field.astype(f"u{bits // 8}").view(a.dtype)


def _known_field(position: int, length: int, bits: int):
    """The same for a field that lies wholly in the type, by two shifts."""
    left, right = bits - position - length, bits - length

    def run(a):
        return a << a.dtype.type(left) >> a.dtype.type(right)

    return run


def _known(position, length) -> tuple[int, int] | None:
    """Position and length, where they are numbers; only their low 8 bits count."""
    if isinstance(position, Immediate) and isinstance(length, Immediate):
        return position.value & 0xFF, length.value & 0xFF
    return None


@opcode("bfe")
def build_extract(machine, instruction):
    """``bfe.type d, a, position, length``: a field of bits, extended by its sign for signed types"""
    type_ = instruction.type
    if instruction.modifiers != (type_,) or type_ not in ("u32", "s32", "u64", "s64"):
        return None
    registers, bits, signed = machine.registers, 8 * SIZES[type_], type_[0] == "s"
    d, a, position, length = instruction.operands
    result, a = registers.result(d, type_), registers.source(a, type_)
    known = _known(position, length)
    if known is not None and known[1] > 0 and sum(known) <= bits:
        function = _known_field(*known, bits)

        def run(threads):
            result[threads] = function(a[threads])
    else:
        position, length = registers.source(position, "u32"), registers.source(length, "u32")

        def run(threads):
            places = ((n[threads] & 0xFF).astype(np.int64) for n in (position, length))
            result[threads] = _field(a[threads], *places, signed)

    return Step(run)


def _inserted(a, b, position, length):
    """b with its field replaced by the low bits of a."""
    bits = 8 * a.dtype.itemsize
    count = np.minimum(length, 63).astype(np.uint64)
    mask = np.where(length >= 64, ~_ZERO, (_ONE << count) - _ONE)
    shift = np.minimum(position, 63).astype(np.uint64)
    mask = np.where(position >= bits, _ZERO, mask << shift)
    put = a.astype(np.uint64) << shift
    return ((put & mask) | (b.astype(np.uint64) & ~mask)).astype(a.dtype)


@opcode("bfi")
def build_insert(machine, instruction):
    """``bfi.type d, a, b, position, length``: the low bits of a replace a field of b"""
    type_ = instruction.type
    if instruction.modifiers != (type_,) or type_ not in ("b32", "b64"):
        return None
    registers, bits = machine.registers, 8 * SIZES[type_]
    d, a, b, position, length = instruction.operands
    result, a, b = (registers.result(d, type_), *(registers.source(o, type_) for o in (a, b)))
    known = _known(position, length)
    if known is not None and known[0] < bits:
        shift = result.dtype.type(known[0])
        mask = result.dtype.type(((1 << known[1]) - 1 << known[0]) % (1 << bits))

        def run(threads):
            result[threads] = (a[threads] << shift & mask) | (b[threads] & ~mask)
    else:
        position, length = registers.source(position, "u32"), registers.source(length, "u32")

        def run(threads):
            places = ((n[threads] & 0xFF).astype(np.int64) for n in (position, length))
            result[threads] = _inserted(a[threads], b[threads], *places)

    return Step(run)


@opcode("prmt")
def build_permute(machine, instruction):
    """``prmt.b32 d, a, b, selector``: four bytes chosen of eight; bit 3 of a choice is its sign"""
    if instruction.modifiers != ("b32",):
        return None
    d, *sources = instruction.operands
    result = machine.registers.result(d, "b32")
    a, b, selector = (machine.registers.source(o, "b32") for o in sources)
    choose = _chosen
    if isinstance(sources[2], Immediate) and not sources[2].value & 0x8888:
        columns = [sources[2].value >> 4 * n & 7 for n in range(4)]

        def choose(eight, _):
            return eight[:, columns]

    def run(threads):
        both = np.stack([a[threads], b[threads]], axis=1)
        found = choose(both.view(np.uint8), selector[threads])
        result[threads] = np.ascontiguousarray(found).view(np.uint32)[:, 0]

    return Step(run)


def _chosen(eight: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """The four bytes (n, 4) that selectors (n,) choose of eight (n, 8)."""
    choices = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    found = np.take_along_axis(eight, (choices & 7).astype(np.int64), axis=1)
    sign = np.where(found & 0x80, np.uint8(0xFF), np.uint8(0))
    return np.where(choices & 8, sign, found)


@opcode("lop3")
def build_logic_of_three(machine, instruction):
    """``lop3.b32 d, a, b, c, table``: bit 4a + 2b + c of the table is the result"""
    if instruction.modifiers != ("b32",) or len(instruction.operands) != 5:
        return None
    *rest, table = instruction.operands
    if not isinstance(table, Immediate) or not 0 <= table.value < 256:
        return None
    d, *sources = rest
    result = machine.registers.result(d, "b32")
    sources = [machine.registers.source(o, "b32") for o in sources]
    rows = [n for n in range(8) if table.value >> n & 1]

    def run(threads):
        given = [source[threads] for source in sources]
        sides = [(~value, value) for value in given]
        found = np.zeros(len(given[0]), np.uint32)
        for n in rows:
            found |= sides[0][n >> 2] & sides[1][n >> 1 & 1] & sides[2][n & 1]
        result[threads] = found

    return Step(run)


@opcode("shf")
def build_funnel_shift(machine, instruction):
    """``shf.l|r.wrap|clamp.b32 d, a, b, n``: a part of {b, a}, of which b is the high word"""
    if len(instruction.modifiers) != 3:
        return None
    way, mode, type_ = instruction.modifiers
    if way not in ("l", "r") or mode not in ("wrap", "clamp") or type_ != "b32":
        return None

    def shifted(a, b, n):
        n = n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))
        both = b.astype(np.uint64) << _32 | a
        found = both << n >> _32 if way == "l" else both >> n
        return found.astype(np.uint32)

    return elementwise(machine, instruction, shifted, "b32")


def leading_zeros(x: np.ndarray) -> np.ndarray:
    """How many zeros an unsigned number of 32 or 64 bits begins with."""
    if x.dtype.itemsize == 8:
        high, low = (x >> _32).astype(np.uint32), x.astype(np.uint32)
        return np.where(high != 0, leading_zeros(high), 32 + leading_zeros(low))
    return (32 - np.frexp(x.astype(np.float64))[1]).astype(np.uint32)


def reversed_bits(x: np.ndarray) -> np.ndarray:
    """Bit 0 becomes the highest, and so on."""
    size = x.dtype.itemsize
    each = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, size), axis=1)
    return np.packbits(each[:, ::-1], axis=1, bitorder="big").view(x.dtype)[:, 0]


def found_bit(x: np.ndarray, as_shift: bool) -> np.ndarray:
    """The place of the highest bit that is not the sign; all ones where there is none."""
    bits = 8 * x.dtype.itemsize
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x).view(f"u{bits // 8}")
    zeros = leading_zeros(x)
    found = zeros if as_shift else np.uint32(bits - 1) - zeros
    return np.where(x == 0, np.uint32(0xFFFFFFFF), found)


@opcode("clz", "popc", "brev")
def build_count(machine, instruction):
    """``clz.type d, a``, ``popc.type d, a`` (d is a u32) and ``brev.type d, a``"""
    if instruction.modifiers not in (("b32",), ("b64",)):
        return None
    functions = {"clz": leading_zeros, "popc": np.bitwise_count, "brev": reversed_bits}
    result_type = instruction.type if instruction.root == "brev" else "u32"
    function = functions[instruction.root]
    return elementwise(machine, instruction, function, instruction.type, result_type)


@opcode("bfind")
def build_find(machine, instruction):
    """``bfind[.shiftamt].type d, a``"""
    *how, type_ = instruction.modifiers
    if how not in ([], ["shiftamt"]) or type_ not in ("u32", "s32", "u64", "s64"):
        return None
    as_shift = bool(how)
    return elementwise(machine, instruction, lambda x: found_bit(x, as_shift), type_, "u32")


@opcode("szext")
def build_extend(machine, instruction):
    """``szext.wrap|clamp.type d, a, n``: the low n bits of a, extended"""
    if instruction.modifiers[:-1] not in (("wrap",), ("clamp",)):
        return None
    mode, type_ = instruction.modifiers
    if type_ not in ("u32", "s32"):
        return None

    def extended(a, n):
        n = n.view(np.uint32)
        n = n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))
        away = np.uint32(32) - n
        wide = a.astype(np.int64) << away.astype(np.int64)
        return np.where(n == 0, 0, wide.astype(DTYPES[type_]).astype(np.int64) >> away).astype(
            a.dtype
        )

    return elementwise(machine, instruction, extended, type_)


@opcode("slct")
def build_select_by_sign(machine, instruction):
    """``slct.type.s32 d, a, b, c``: a where c is not negative, else b"""
    if len(instruction.modifiers) != 2 or instruction.type != "s32":
        return None
    type_ = instruction.modifiers[0]
    if type_ not in DTYPES or SIZES[type_] not in (2, 4, 8) or "x2" in type_:
        return None
    registers = machine.registers
    d, a, b, c = instruction.operands
    result, a, b = (registers.result(d, type_), registers.source(a, type_), registers.source(b, type_))  # fmt: skip
    c = registers.source(c, "s32")

    def run(threads):
        result[threads] = np.where(c[threads] >= 0, a[threads], b[threads])

    return Step(run)
