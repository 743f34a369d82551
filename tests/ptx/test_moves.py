"""mov, ld, st, cvta: packing, widths, extension, addresses, and what is no allocation."""

import numpy as np
import pytest

from .errors import BadAccess, Unsupported
from .expected import apply
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import Launch
from .parser import parse
from .programs import execute

HEAD = """
.reg .pred p; .reg .b16 %h<9>; .reg .b32 i, %r<9>; .reg .b64 a, b, at, %w<5>;
mov.u32 i, %tid.x; ld.param.u64 a, [p0]; ld.param.u64 b, [p1];
"""


def aligned(array):
    """A copy that begins at a multiple of 64 bytes."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def rows(lines, given, width, threads=32, shared=0):
    """``lines`` with ``a`` at the thread's row of given bytes and ``b`` at its ``width`` bytes out."""
    each = given.nbytes // threads
    given, found = aligned(given), aligned(np.zeros((threads, width), np.uint8))
    place = (f"mul.wide.u32 at, i, {each}; add.s64 a, a, at; mul.wide.u32 at, i, {width};"
             " add.s64 b, b, at;")  # fmt: skip
    execute(HEAD + place + lines, given, found, threads=threads, shared=shared)
    return found


def numbered(size, threads=32):
    return (np.arange(threads * size) * 37 % 251).astype(np.uint8).reshape(threads, size)


COPIES = [
    ("b8", 1, "%h1"), ("v2.b8", 2, "{%h1, %h2}"), ("v4.b8", 4, "{%h1, %h2, %h3, %h4}"),
    ("b16", 2, "%h1"), ("v2.b16", 4, "{%h1, %h2}"), ("v4.b16", 8, "{%h1, %h2, %h3, %h4}"),
    ("b32", 4, "%r1"), ("v2.b32", 8, "{%r1, %r2}"), ("v4.f32", 16, "{%r1, %r2, %r3, %r4}"),
    ("v8.b32", 32, "{%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}"), ("u64", 8, "%w1"),
    ("v2.b64", 16, "{%w1, %w2}"), ("v2.u8", 2, "{%r1, %r2}"),
]  # fmt: skip


@pytest.mark.parametrize("form, size, names", COPIES, ids=[c[0] for c in COPIES])
def test_what_is_loaded_is_stored(form, size, names):
    given = numbered(size)
    found = rows(f"ld.global.{form} {names}, [a]; st.global.{form} [b], {names};", given, size)
    assert (found == given).all()
    through = (f"mul.wide.u32 %w4, i, {size}; cvt.u32.u64 %r0, %w4; mov.b32 %r8, memory; add.u32 %r0, %r0, %r8;"
               f" ld.global.{form} {names}, [a]; st.shared.{form} [%r0], {names};"
               f" ld.shared.{form} {names}, [%r0+0]; st.global.{form} [b], {names};")  # fmt: skip
    if size < 32:  # the address takes %r8
        assert (rows(through, given, size, shared=32 * size) == given).all()


def test_small_types_are_extended_into_wide_registers():
    a = np.array([[0x80], [0x7F], [0xFF], [0]] * 8, np.uint8)
    for type_, wanted in (("u8", [0x80, 0x7F, 0xFF, 0]), ("s8", [2**32 - 128, 127, 2**32 - 1, 0]),
                          ("b8", [0x80, 0x7F, 0xFF, 0])):  # fmt: skip
        found = rows(f"mov.b32 %r1, -1; ld.global.{type_} %r1, [a]; st.global.b32 [b], %r1;", a, 4)
        assert found.view(np.uint32).ravel()[:4].tolist() == wanted
    a = np.array([0x8001, 1] * 16, np.uint16)
    found = rows("ld.global.s16 %w1, [a]; st.global.b64 [b], %w1;", a, 8)
    assert found.view(np.int64).ravel()[:2].tolist() == [-32767, 1]


def test_a_store_takes_the_low_part():
    found = rows("mov.b32 %r1, 0x12345678; st.global.b8 [b], %r1; st.global.b8 [b+1], %r1;", numbered(1), 2)  # fmt: skip
    assert (found == 0x78).all()


def test_qualifiers_that_change_no_value_are_accepted():
    given = numbered(16)
    names = "{%r1, %r2, %r3, %r4}"
    for word in ("relaxed.gpu.global", "volatile.global", "global.nc", "weak.global",
                 "global.L1::evict_last", "global.nc.L1::no_allocate.L2::128B"):  # fmt: skip
        found = rows(f"ld.{word}.v4.b32 {names}, [a]; st.global.v4.b32 [b], {names};", given, 16)
        assert (found == given).all()
    found = rows("createpolicy.fractional.L2::evict_first.b64 %w1, 1.0;"
                 " ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r1, %r2, %r3, %r4}, [a], %w1;"
                 " st.global.L2::cache_hint.v4.b32 [b], {%r1, %r2, %r3, %r4}, %w1;", given, 16)  # fmt: skip
    assert (found == given).all()


def test_packing_and_unpacking():
    a = np.array([0x44332211], np.uint32)
    assert apply("{.reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, {y, x};}", a)[0] == 0x22114433
    wide = np.array([0x8877665544332211], np.uint64)
    assert apply("{.reg .b32 x; mov.b64 {_, x}, a; mov.b32 d, x;}", wide)[0] == 0x88776655
    lines = "{.reg .b16 x, y, z, u; mov.b64 {x, y, z, u}, a; mov.b64 d, {u, z, y, x};}"
    assert apply(lines, wide, result=np.uint64)[0] == 0x2211443366558877
    assert apply("{.reg .b32 x; mov.b64 {x, _}, a; mov.b64 d, {x, 5};}", wide, result=np.uint64)[0] == 0x544332211  # fmt: skip
    # the parts of a register may come from the register itself
    assert apply("mov.b32 d, a; {.reg .b16 x, y; mov.b32 {x, y}, d; mov.b32 d, {y, y};}", a)[0] == 0x44334433  # fmt: skip


def test_immediates():
    a = np.zeros(1, np.uint32)
    assert apply("mov.b32 d, -1;", a)[0] == 2**32 - 1
    assert apply("mov.f32 d, 0fBF800000;", a)[0] == 0xBF800000
    assert apply("mov.f32 d, 0f80000000;", a)[0] == 0x80000000  # not the constant of 0.0
    assert apply("mov.f32 d, 0f00000000; mov.f32 d, 0f80000000;", a)[0] == 0x80000000
    assert apply("mov.b64 d, 0d3FF0000000000000;", a, result=np.float64)[0] == 1
    assert apply("mov.b32 d, 0x7773U;", a)[0] == 0x7773
    assert apply("mov.pred p, -1; selp.u32 d, 1, 0, p;", a)[0] == 1
    assert apply("mov.pred p, 0; selp.u32 d, 1, 0, p;", a)[0] == 0
    assert apply("mov.f32 d, 1.5;", a, result=np.float32)[0] == 1.5


def test_specials():
    body = """
    .reg .b32 i, n, %r<9>; .reg .b64 a, at;
    mov.u32 i, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %laneid;
    mov.u32 %r4, %nctaid.x; mad.lo.s32 n, %r1, %r2, i;
    ld.param.u64 a, [p0]; mul.wide.s32 at, n, 16; add.s64 a, a, at;
    st.global.v4.b32 [a], {%r1, %r2, %r3, %r4};
    """
    found = np.zeros((3 * 64, 4), np.uint32)
    execute(body, found, threads=64, blocks=3)
    threads = np.arange(3 * 64)
    assert (found == np.stack([threads // 64, threads * 0 + 64, threads % 32, threads * 0 + 3], 1)).all()  # fmt: skip


def parameters(kinds, values, lines, threads=32):
    """A kernel with parameters of some types, which stores 4 bytes of each thread to its first."""
    listed = ", ".join(f".param {kind} p{n}" for n, kind in enumerate(kinds))
    text = f""".version 8.7
.target sm_80
.visible .entry k({listed}) {{
.reg .b32 i, %r<4>; .reg .b64 a, b, at;
ld.param.u64 a, [p0]; mov.u32 i, %tid.x; mul.wide.u32 at, i, 4; add.s64 b, a, at;
{lines} st.global.b32 [b], %r1; ret; }}"""
    entry = parse(text)
    found, memory, data = np.zeros(threads, np.uint32), GlobalMemory(), bytearray(64)
    memory.add(Allocation(found.ctypes.data, found.nbytes))
    data[:8] = int(found.ctypes.data).to_bytes(8, "little")
    for parameter, value in zip(entry.parameters[1:], values):
        data[parameter.offset : parameter.offset + len(value)] = value
    run(Launch(entry, (1, 1, 1), threads, bytes(data), 0, 1, memory))
    return found


def test_parameters_of_all_sizes():
    first = ".u64 .ptr .global .align 1"
    found = parameters(
        [first, ".u8", ".u32"], [b"\xf0", bytes(range(4))], "ld.param.b32 %r1, [p2];"
    )
    assert (found == 0x03020100).all()
    found = parameters([first, ".u8"], [b"\xf0"], "ld.param.s8 %r1, [p1];")
    assert (found == 0xFFFFFFF0).all()
    found = parameters([first, ".u64"], [bytes(range(8))], "ld.param.v2.u32 {%r2, %r1}, [p1];")
    assert (found == 0x07060504).all()
    found = parameters([first, ".u64"], [bytes(range(8))], "ld.param.b32 %r1, [p1+4];")
    assert (found == 0x07060504).all()


def test_cvta_keeps_global_addresses():
    found = rows("cvta.to.global.u64 b, b; cvta.global.u64 b, b; st.global.b32 [b], i;", numbered(1), 4)  # fmt: skip
    assert found.view(np.uint32).ravel().tolist() == list(range(32))


def test_accesses_outside_and_misaligned():
    with pytest.raises(BadAccess, match="in no allocation"):
        rows("ld.global.b32 %r1, [a+128];", numbered(4), 4)
    with pytest.raises(BadAccess, match="multiple of 4"):
        rows("ld.global.b32 %r1, [a+1];", numbered(4), 4)
    with pytest.raises(BadAccess, match="multiple of 16"):
        rows("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [a+4];", numbered(32), 4)
    with pytest.raises(BadAccess, match="outside the block"):
        rows("mov.b32 %r0, memory; st.shared.b32 [%r0+64], i;", numbered(4), 4, shared=64)


REFUSED = [
    "ld.b32 %r1, [a];", "ld.local.b32 %r1, [a];", "st.global.v2.b32 [b], {%r1, %r2, %r3};",
    "ld.global.v3.b32 {%r1, %r2, %r3}, [a];", "mov.b32 %r1, %clock;", "ld.global.e5m2 %r1, [a];",
    "st.const.b32 [b], %r1;", "cvta.local.u64 %w1, a;", "ld.global.acquire.gpu.b32 %r1, [a];",
    "mov.v2.b32 %r1, %r2;", "ld.global.pred p, [a];", "mov.b64 {%r1, %r2}, a, b;",
    "mov.b32 %r1, nowhere;", "st.global.b32 [b], %r1, %w1;",
    "createpolicy.range.L2::evict_last.b64 %w1, [a], 4, 8;",
]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_unknown_forms_are_refused(line):
    with pytest.raises(Unsupported, match="PTX line"):
        rows(line, numbered(4), 4)
