"""Integers, bits, predicates and selection, against Python's own integers."""

import numpy as np
import pytest

from .errors import Unsupported
from .expected import apply

TYPES = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}  # fmt: skip


def edges(type_, seed=0, count=96):
    """Random numbers of all sizes, with the limits among them."""
    dtype = TYPES[type_]
    limits, random = np.iinfo(dtype), np.random.default_rng(seed)
    found = random.integers(limits.min, limits.max, count, dtype, endpoint=True)
    found >>= random.integers(0, limits.bits, count).astype(dtype)
    found[:6] = [limits.max, limits.min, 0, 1, limits.max, limits.min]
    return found


def wrapped(numbers, dtype):
    """Integers modulo the size of a type."""
    bits = 8 * np.dtype(dtype).itemsize
    return np.array([n % 2**bits for n in numbers], f"u{bits // 8}").view(dtype).tolist()


def quotient(a, b):
    """Towards zero; a division by zero gives all ones."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


OPERATIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b,
    "min": min, "max": max, "div": quotient,
    "rem": lambda a, b: a if b == 0 else a - quotient(a, b) * b,
}  # fmt: skip


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_integers_wrap(name, type_):
    a, b = edges(type_), np.roll(edges(type_, 1), 1)
    found = apply(f"{name}.{type_} d, a, b;", a, b, result=TYPES[type_])
    wanted = (OPERATIONS[name](x, y) for x, y in zip(a.tolist(), b.tolist()))
    assert found.tolist() == wrapped(wanted, TYPES[type_])


@pytest.mark.parametrize("type_", TYPES)
def test_halves_of_products(type_):
    dtype, bits = TYPES[type_], 8 * np.dtype(TYPES[type_]).itemsize
    a, b, c = edges(type_), np.roll(edges(type_, 1), 1), edges(type_, 2)
    rows = list(zip(a.tolist(), b.tolist(), c.tolist()))
    found = apply(f"mul.hi.{type_} d, a, b;", a, b, result=dtype)
    assert found.tolist() == wrapped((x * y >> bits for x, y, _ in rows), dtype)
    found = apply(f"mad.lo.{type_} d, a, b, c;", a, b, c, result=dtype)
    assert found.tolist() == wrapped((x * y + z for x, y, z in rows), dtype)
    if bits < 64:
        wide = TYPES[f"{type_[0]}{2 * bits}"]
        found = apply(f"mul.wide.{type_} d, a, b;", a, b, result=wide)
        assert found.tolist() == [x * y for x, y, _ in rows]
        found = apply(f"mad.wide.{type_} d, a, b, c;", a, b, c.astype(wide), result=wide)
        assert found.tolist() == wrapped((x * y + z for x, y, z in rows), wide)


def test_signs_and_saturation():
    a = np.array([-5, -(2**31), 2**31 - 1], np.int32)
    assert apply("abs.s32 d, a;", a, result=np.int32).tolist() == [5, -(2**31), 2**31 - 1]
    assert apply("neg.s32 d, a;", a, result=np.int32).tolist() == [5, -(2**31), -(2**31) + 1]
    found = apply("add.sat.s32 d, a, a;", a, result=np.int32)
    assert found.tolist() == [-10, -(2**31), 2**31 - 1]
    found = apply("sub.sat.s32 d, a, 10;", a, result=np.int32)
    assert found.tolist() == [-15, -(2**31), 2**31 - 11]


def test_shifts_are_limited_to_the_size_of_the_type():
    a = np.array([0x80000001] * 5, np.uint32)
    n = np.array([0, 1, 31, 32, 0xFFFFFFFF], np.uint32)  # -1 is a shift by more than all bits
    assert apply("shl.b32 d, a, b;", a, n).tolist() == [0x80000001, 2, 0x80000000, 0, 0]
    assert apply("shr.u32 d, a, b;", a, n).tolist() == [0x80000001, 0x40000000, 1, 0, 0]
    assert apply("shr.b32 d, a, b;", a, n).tolist() == [0x80000001, 0x40000000, 1, 0, 0]
    assert apply("shr.s32 d, a, b;", a, n).tolist() == [0x80000001, 0xC0000000] + [0xFFFFFFFF] * 3
    for count in n.tolist():  # the same where it is known before
        for name in ("shl.b32", "shr.u32", "shr.s32"):
            wanted = apply(f"{name} d, a, b;", a, np.full(5, count, np.uint32))
            assert (apply(f"{name} d, a, {count};", a) == wanted).all()
    assert apply("shr.s32 d, a, -1;", a)[0] == 0xFFFFFFFF and apply("shl.b32 d, a, -1;", a)[0] == 0
    wide = np.array([2**63 + 1] * 5, np.uint64)
    n = np.array([0, 32, 63, 64, 300], np.uint32)
    assert apply("shl.b64 d, a, b;", wide, n, result=np.uint64).tolist() == [2**63 + 1, 2**32, 2**63, 0, 0]  # fmt: skip
    assert apply("shr.s64 d, a, b;", wide, n, result=np.int64).tolist() == [-(2**63) + 1, -(2**31), -1, -1, -1]  # fmt: skip
    short = np.array([0x8001] * 3, np.uint16)
    assert apply("shl.b16 d, a, b;", short, np.array([1, 15, 16], np.uint32), result=np.uint16).tolist() == [2, 0x8000, 0]  # fmt: skip
    assert apply("shr.s16 d, a, b;", short, np.array([1, 15, 99], np.uint32), result=np.int16).tolist() == [-16384, -1, -1]  # fmt: skip


def test_funnel_shifts():
    low, high = np.array([0x89ABCDEF] * 5, np.uint32), np.array([0x01234567] * 5, np.uint32)
    n, both = np.array([0, 8, 31, 32, 40], np.uint32), 0x0123456789ABCDEF
    shifts = {"wrap": [0, 8, 31, 0, 8], "clamp": [0, 8, 31, 32, 32]}
    for mode, counts in shifts.items():
        found = apply(f"shf.l.{mode}.b32 d, a, b, c;", low, high, n)
        assert found.tolist() == [(both << k >> 32) % 2**32 for k in counts]
        found = apply(f"shf.r.{mode}.b32 d, a, b, c;", low, high, n)
        assert found.tolist() == [(both >> k) % 2**32 for k in counts]


def extracted(a, position, length, bits, signed):
    """bfe, bit by bit as in the manual."""
    top = bits - 1
    sign = a >> min(position + length - 1, top) & 1 if signed and length else 0
    each = [a >> position + n & 1 if n < length and position + n <= top else sign for n in range(bits)]  # fmt: skip
    return sum(bit << n for n, bit in enumerate(each))


@pytest.mark.parametrize("bits", [32, 64])
def test_fields_are_extracted_and_inserted(bits):
    dtype = np.dtype(f"u{bits // 8}")
    places = [0, 1, 5, 31, 32, 40, 63, 64, 255, 256 + 3]
    pairs = [(p, n) for p in places for n in [0, 1, 7, 31, 32, 64, 255]]
    position, length = (np.array(row, np.uint32) for row in zip(*pairs))
    a = np.random.default_rng(3).integers(0, 2**bits, len(pairs), dtype, endpoint=False)
    b = a[::-1].copy()
    for kind in "us":
        found = apply(f"bfe.{kind}{bits} d, a, b, c;", a, position, length, result=dtype)
        wanted = [extracted(int(x), p & 255, n & 255, bits, kind == "s") for x, (p, n) in zip(a, pairs)]  # fmt: skip
        assert found.tolist() == wanted
    for p, n in [(0, bits), (3, 29), (13, 19), (31, 5), (bits, 3), (5, 0), (0, 1), (bits - 1, 1), (4, 255)]:  # fmt: skip
        mask = (2 ** min(n, 64) - 1) << p & (2**bits - 1)
        wanted = [(int(x) << p & mask) | (int(y) & ~mask) for x, y in zip(a, b)]
        found = apply(f"bfi.b{bits} d, a, b, {p}, {n};", a, b, result=dtype)
        assert found.tolist() == wanted
        place = np.full(len(a), p | n << 16, np.uint32)  # the same, known only when it runs
        lines = f"and.b32 t, c, 0xFFFF; shr.u32 c, c, 16; bfi.b{bits} d, a, b, t, c;"
        assert apply(lines, a, b, place, result=dtype).tolist() == wanted
        for kind in "us":
            found = apply(f"bfe.{kind}{bits} d, a, {p}, {n};", a, result=dtype)
            assert found.tolist() == [extracted(int(x), p, n, bits, kind == "s") for x in a]


def test_bytes_are_permuted():
    a, b = np.array([0x83828180] * 32, np.uint32), np.array([0x07060504] * 32, np.uint32)
    for selector, wanted in ((0x3210, 0x83828180), (0x7654, 0x07060504), (0x5410, 0x05048180),
                             (0x3340, 0x83830480), (0xFEDC, 0), (0xBA98, 0xFFFFFFFF),
                             (0x7770, 0x07070780), (0x8F81, 0xFF00FF81)):  # fmt: skip
        assert apply(f"prmt.b32 d, a, b, {selector:#x}U;", a, b)[0] == wanted
        assert apply("prmt.b32 d, a, b, c;", a, b, np.full(32, selector, np.uint32))[7] == wanted
    assert apply("prmt.b32 d, a, 0, 0x7771U;", a)[0] == 0x81


@pytest.mark.parametrize("table", [0x00, 0xFF, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B])
def test_logic_of_three(table):
    a, b, c = (edges("u32", n) for n in range(3))
    found = apply(f"lop3.b32 d, a, b, c, {table:#x};", a, b, c)
    for x, y, z, d in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist()):
        for n in range(32):
            assert d >> n & 1 == table >> (4 * (x >> n & 1) + 2 * (y >> n & 1) + (z >> n & 1)) & 1


@pytest.mark.parametrize("bits", [32, 64])
def test_counts_of_bits(bits):
    a = edges(f"u{bits}")
    each = [f"{x:0{bits}b}" for x in a.tolist()]
    found = apply(f"clz.b{bits} d, a;", a)
    assert found.tolist() == [(x + "1").index("1") for x in each]
    assert apply(f"popc.b{bits} d, a;", a).tolist() == [x.count("1") for x in each]
    found = apply(f"brev.b{bits} d, a;", a, result=a.dtype)
    assert found.tolist() == [int(x[::-1], 2) for x in each]
    found = apply(f"bfind.u{bits} d, a;", a)
    assert found.tolist() == [x.bit_length() - 1 if x else 2**32 - 1 for x in a.tolist()]
    signed = a.view(f"i{bits // 8}")
    places = [(x if x >= 0 else ~x).bit_length() - 1 for x in signed.tolist()]
    found = apply(f"bfind.s{bits} d, a;", a)
    assert found.tolist() == [p if p >= 0 else 2**32 - 1 for p in places]
    found = apply(f"bfind.shiftamt.s{bits} d, a;", a)
    assert found.tolist() == [bits - 1 - p if p >= 0 else 2**32 - 1 for p in places]


def test_low_bits_are_extended():
    a, n = np.array([0xFFFFFF85] * 5, np.uint32), np.array([0, 3, 8, 32, 35], np.uint32)
    assert apply("szext.wrap.s32 d, a, b;", a, n, result=np.int32).tolist() == [0, -3, -123, 0, -3]
    found = apply("szext.clamp.s32 d, a, b;", a, n, result=np.int32)
    assert found.tolist() == [0, -3, -123, -123, -123]
    found = apply("szext.clamp.u32 d, a, b;", a, n)
    assert found.tolist() == [0, 5, 0x85, 0xFFFFFF85, 0xFFFFFF85]


def test_logic():
    a, b = np.array([0xF0F0], np.uint16), np.array([0xFF00], np.uint16)
    for name, wanted in (("and", 0xF000), ("or", 0xFFF0), ("xor", 0x0FF0)):
        assert apply(f"{name}.b16 d, a, b;", a, b, result=np.uint16)[0] == wanted
    assert apply("not.b16 d, a;", a, result=np.uint16)[0] == 0x0F0F
    a = np.array([0, 1, 2, 3], np.uint32)
    lines = "setp.lt.u32 p, a, 2; setp.eq.u32 q, a, 1; {} r, p, q; selp.u32 d, 1, 0, r;"
    assert apply(lines.format("and.pred"), a).tolist() == [0, 1, 0, 0]
    assert apply(lines.format("xor.pred"), a).tolist() == [1, 0, 0, 0]
    assert apply("setp.lt.u32 p, a, 2; not.pred p, p; selp.u32 d, 1, 0, p;", a).tolist() == [0, 0, 1, 1]  # fmt: skip


def test_selection():
    a, b = np.array([-1, 0, 5], np.int32), np.array([7, 8, 9], np.int32)
    assert apply("setp.lt.s32 p, a, 0; selp.b32 d, a, b, p;", a, b, result=np.int32).tolist() == [-1, 8, 9]  # fmt: skip
    assert apply("slct.s32.s32 d, b, 100, a;", a, b, result=np.int32).tolist() == [100, 8, 9]


def test_comparisons_of_integers():
    a, b = np.array([-1, 0, 5, 5], np.int32), np.array([1, 0, -6, 6], np.int32)
    for name, wanted in (("eq", [0, 1, 0, 0]), ("ne", [1, 0, 1, 1]), ("lt", [1, 0, 0, 1]),
                         ("le", [1, 1, 0, 1]), ("gt", [0, 0, 1, 0]), ("ge", [0, 1, 1, 0])):  # fmt: skip
        found = apply(f"setp.{name}.s32 p, a, b; selp.u32 d, 1, 0, p;", a, b)
        assert found.tolist() == wanted, name
    for name in ("lt", "lo"):  # -1 is the largest u32
        assert apply(f"setp.{name}.u32 p, a, b; selp.u32 d, 1, 0, p;", a, b).tolist() == [
            0,
            0,
            1,
            1,
        ]


def test_two_results_and_a_third_operand():
    a = np.array([0, 1, 2, 3], np.uint32)
    lines = ("setp.lt.u32 q, a, 1; setp.{}.u32 p|r, a, 2, q; selp.u32 d, 1, 0, p;"
             " selp.u32 t, 2, 0, r; add.u32 d, d, t;")  # fmt: skip
    # p is (a < 2) op q, r is !(a < 2) op q
    assert apply(lines.format("lt.and"), a).tolist() == [1, 0, 0, 0]
    assert apply(lines.format("lt.or"), a).tolist() == [3, 1, 2, 2]
    assert apply(lines.format("lt.xor"), a).tolist() == [2, 1, 2, 2]
    # the third operand is read before a result in its register is written
    lines = "setp.lt.u32 p, a, 1; setp.lt.and.u32 p|r, a, 2, p; selp.u32 d, 1, 0, p; selp.u32 t, 2, 0, r; add.u32 d, d, t;"  # fmt: skip
    assert apply(lines, a).tolist() == [1, 0, 0, 0]
    lines = "setp.lt.u32 p, a, 1; setp.gt.or.u32 p|r, a, 2, p; selp.u32 d, 1, 0, p; selp.u32 t, 2, 0, r; add.u32 d, d, t;"  # fmt: skip
    assert apply(lines, a).tolist() == [3, 2, 2, 1]


COMPARISONS = {  # of (1, 2), (2, 2), (3, 2), (NaN, 2), (NaN, NaN)
    "eq": [0, 1, 0, 0, 0], "ne": [1, 0, 1, 0, 0], "lt": [1, 0, 0, 0, 0], "ge": [0, 1, 1, 0, 0],
    "equ": [0, 1, 0, 1, 1], "neu": [1, 0, 1, 1, 1], "ltu": [1, 0, 0, 1, 1], "geu": [0, 1, 1, 1, 1],
    "num": [1, 1, 1, 0, 0], "nan": [0, 0, 0, 1, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats_and_nans(name):
    a, b = np.array([1, 2, 3, np.nan, np.nan]), np.array([2, 2, 2, 2, np.nan])
    lines = f"setp.{name}.%s p, a, b; selp.u32 d, 1, 0, p;"
    given = {"f64": (a, b), "f32": (a.astype(np.float32), b.astype(np.float32)),
             "f16": (a.astype(np.float16), b.astype(np.float16))}  # fmt: skip
    given["bf16"] = tuple((x.view(np.uint32) >> 16).astype(np.uint16) for x in given["f32"])
    for type_, (x, y) in given.items():
        assert apply(lines % type_, x, y).tolist() == COMPARISONS[name], type_


def test_comparisons_flush_where_they_say_so():
    a = np.array([2.0**-130, -(2.0**-149), 2.0**-126], np.float32)
    lines = "setp.eq.%s p, a, 0f00000000; selp.u32 d, 1, 0, p;"
    assert apply(lines % "f32", a).tolist() == [0, 0, 0]
    assert apply(lines % "ftz.f32", a).tolist() == [1, 1, 0]


def test_comparisons_of_pairs():
    # (high, low): (1, -1), (NaN, 2), (0, 1) against (0, 0)
    a = np.array([0x3F80BF80, 0x7FC04000, 0x00003F80], np.uint32)
    lines = "setp.gt.bf16x2 p|q, a, b; selp.u32 d, 1, 0, p; selp.u32 t, 2, 0, q; add.u32 d, d, t;"
    assert apply(lines, a, np.zeros(3, np.uint32)).tolist() == [2, 1, 1]
    a = np.array([0x3C00BC00, 0x7E004000, 0x00003C00], np.uint32)
    assert apply(lines.replace("bf16", "f16"), a, np.zeros(3, np.uint32)).tolist() == [2, 1, 1]
    lines = lines.replace("setp.gt.bf16x2 p|q, a, b", "setp.eq.b32 r, a, a; setp.gtu.and.f16x2 p|q, a, b, r")  # fmt: skip
    assert apply(lines, a, np.zeros(3, np.uint32)).tolist() == [2, 3, 1]
    lines = lines.replace("eq.b32 r, a, a", "ne.b32 p, a, a").replace("b, r;", "b, p;")
    assert apply(lines.replace("gtu.and", "gtu.or"), a, np.zeros(3, np.uint32)).tolist() == [
        2,
        3,
        1,
    ]
    lines = lines.replace("ne.b32", "eq.b32")  # p is the third operand and the first result
    assert apply(lines, a, np.zeros(3, np.uint32)).tolist() == [2, 3, 1]


def test_set():
    a, b = np.array([1, 2, np.nan], np.float32), np.array([2, 2, 2], np.float32)
    assert apply("set.lt.u32.f32 d, a, b;", a, b).tolist() == [2**32 - 1, 0, 0]
    assert apply("set.geu.f32.f32 d, a, b;", a, b, result=np.float32).tolist() == [0, 1, 1]
    assert apply("set.eq.s32.u32 d, a, b;", a, b, result=np.int32).tolist() == [0, -1, 0]
    pairs = np.array([0x3C004000], np.uint32), np.array([0x40004000], np.uint32)
    assert apply("set.eq.u32.f16x2 d, a, b;", *pairs)[0] == 0x0000FFFF
    assert apply("set.eq.f16x2.f16x2 d, a, b;", *pairs)[0] == 0x00003C00
    half = np.array([0x3F80], np.uint16)
    assert apply("set.eq.bf16.bf16 d, a, a;", half, result=np.uint16)[0] == 0x3F80
    assert apply("set.eq.u16.bf16 d, a, a;", half, result=np.uint16)[0] == 0xFFFF


REFUSED = [
    "add.cc.u32 d, a, b;", "addc.u32 d, a, b;", "mul24.lo.u32 d, a, b;", "dp4a.u32.u32 d, a, b, c;",
    "mul.u32 d, a, b;", "add.b32 d, a, b;", "abs.u32 d, a;", "prmt.b32.f4e d, a, b, c;",
    "shl.s32 d, a, b;", "setp.lt.b32 p, a, b;", "setp.ltu.s32 p, a, b;", "min.relu.s32 d, a, b;",
    "lop3.and.b32 d|p, a, b, c, 0x80, q;", "lop3.b32 d, a, b, c, 256;", "add.u16x2 d, a, b;",
    "setp.gt.bf16x2 p, a, b;", "setp.gt.ftz.bf16 p, a, b;", "mad.hi.sat.s32 d, a, b, c;",
    "sad.u32 d, a, b, c;", "fns.b32 d, a, b, c;", "add.s32 d, a;", "vadd.u32.u32.u32 d, a, b;",
    "set.lt.u32.f32.f32 d, a, b;", "slct.f32.f32 d, a, b, c;",
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_unknown_instructions_are_refused(line):
    with pytest.raises(Unsupported, match="PTX line"):
        apply(line, *[np.zeros(32, np.uint32)] * 3)
