"""ldmatrix, stmatrix and mma.sync against the fragment layouts of PTX ISA 9.7.14, lane by lane."""

import numpy as np
import pytest

from .errors import BadAccess, MachineError, Race, Unsupported
from .machine import Mode
from .programs import execute

LANES = range(32)


# ---- the layouts, written down from the manual: (row, column) of an element of a lane


def a_16(lane, i):
    """A of m16n8k16, 16-bit: a0..a7 (9.7.14.5.8); its first four are A of m16n8k8."""
    row = lane // 4 + (0 if i in (0, 1, 4, 5) else 8)
    return row, lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def b_16(lane, i):
    """B of m16n8k16, 16-bit: b0..b3; its first two are B of m16n8k8."""
    return lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4


def a_tf32(lane, i):
    """A of m16n8k8, tf32: a0..a3; its first two are A of m16n8k4."""
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b_tf32(lane, i):
    """B of m16n8k8, tf32: b0, b1; its first is B of m16n8k4."""
    return lane % 4 + (4 if i == 1 else 0), lane // 4


def c_any(lane, i):
    """C and D: c0..c3."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def fragment(matrix, layout, count):
    """(32, count) elements of the lanes."""
    return np.array([[matrix[layout(lane, i)] for i in range(count)] for lane in LANES])


def unfragment(elements, layout, shape):
    matrix = np.full(shape, np.nan)
    for lane in LANES:
        for i in range(elements.shape[1]):
            matrix[layout(lane, i)] = elements[lane, i]
    return matrix


# ---- mma.sync


def bfloat_bits(x):
    """The upper halves of fp32 that are bf16 already."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def loads(name, parameter, count, each_lane):
    """PTX that loads ``count`` registers of 32 bits a thread."""
    base = f"ld.param.u64 %q, [{parameter}];\nmad.wide.u32 %q, %t, {each_lane}, %q;\n"
    return base + "".join(f"ld.global.b32 {name}{n}, [%q+{4 * n}];\n" for n in range(count))


def multiply(opcode, a, b, c, words_of_c):
    """D of one mma, from fragments of 32-bit words."""
    d = np.full_like(c, 0xFFFFFFFF)
    warps = len(a) // 32
    na, nb, nc = a.shape[1], b.shape[1], words_of_c

    def listed(name, n):
        return "{" + ", ".join(f"{name}{i}" for i in range(n)) + "}"

    body = (
        ".reg .b32 %a<4>, %b<4>, %c<4>, %d<4>, %t;\n.reg .b64 %q;\nmov.u32 %t, %tid.x;\n"
        + loads("%a", "p0", na, 4 * na) + loads("%b", "p1", nb, 4 * nb)
        + loads("%c", "p2", nc, 4 * nc)
        + f"{opcode} {listed('%d', nc)}, {listed('%a', na)}, {listed('%b', nb)}, {listed('%c', nc)};\n"
        + f"ld.param.u64 %q, [p3];\nmad.wide.u32 %q, %t, {4 * nc}, %q;\n"
        + "".join(f"st.global.b32 [%q+{4 * n}], %d{n};\n" for n in range(nc))
    )  # fmt: skip
    execute(body, a, b, c, d, threads=32 * warps, target="sm_80")
    return d


def words(elements):
    return np.ascontiguousarray(elements).view(np.uint32)


CASES = [
    ("m16n8k16", "f16", 16, a_16, b_16, 8, 4),
    ("m16n8k16", "bf16", 16, a_16, b_16, 8, 4),
    ("m16n8k8", "f16", 8, a_16, b_16, 4, 2),
    ("m16n8k8", "bf16", 8, a_16, b_16, 4, 2),
    ("m16n8k8", "tf32", 8, a_tf32, b_tf32, 4, 2),
    ("m16n8k4", "tf32", 4, a_tf32, b_tf32, 2, 1),
]


@pytest.mark.parametrize("shape, type_, k, a_at, b_at, na, nb", CASES)
def test_mma_multiplies_the_manuals_fragments(shape, type_, k, a_at, b_at, na, nb):
    random = np.random.default_rng(0)
    encode = {"f16": lambda x: x.astype(np.float16), "bf16": bfloat_bits,
              "tf32": lambda x: x.astype(np.float32)}[type_]  # fmt: skip
    a, b = random.integers(-8, 9, (3, 16, k)) / 4, random.integers(-8, 9, (3, k, 8)) / 4
    c = random.integers(-64, 65, (3, 16, 8)) / 8
    d = multiply(
        f"mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32",
        np.concatenate([words(encode(fragment(x, a_at, na))) for x in a]),
        np.concatenate([words(encode(fragment(x, b_at, nb))) for x in b]),
        np.concatenate([words(fragment(x, c_any, 4).astype(np.float32)) for x in c]), 4,
    ).view(np.float32)  # fmt: skip
    for n in range(3):  # small integers over 8: every sum is exact
        found = unfragment(d[32 * n : 32 * n + 32], c_any, (16, 8))
        np.testing.assert_array_equal(found, a[n] @ b[n] + c[n])


@pytest.mark.parametrize("shape, k, na, nb", [("m16n8k16", 16, 8, 4), ("m16n8k8", 8, 4, 2)])
def test_mma_has_half_accumulators(shape, k, na, nb):
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(s).astype(np.float16) for s in ((16, k), (k, 8), (16, 8)))
    d = multiply(f"mma.sync.aligned.{shape}.row.col.f16.f16.f16.f16",
                 words(fragment(a, a_16, na)), words(fragment(b, b_16, nb)),
                 words(fragment(c, c_any, 4)), 2)  # fmt: skip
    found = unfragment(d.view(np.float16), c_any, (16, 8))
    wanted = (a.astype(float) @ b.astype(float) + c.astype(float)).astype(np.float16)
    np.testing.assert_array_equal(found, wanted)


def test_mma_ignores_the_low_bits_of_tf32():
    a, b = np.ones((16, 8), np.float32), np.ones((8, 8), np.float32)
    c = np.zeros((16, 8), np.float32)
    rough = (a.view(np.uint32) | 0x1FFF).view(np.float32)  # nearly 1.001
    d = multiply("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
                 words(fragment(rough, a_tf32, 4)), words(fragment(b, b_tf32, 2)),
                 words(fragment(c, c_any, 4)), 4)  # fmt: skip
    np.testing.assert_array_equal(d.view(np.float32), 8)


def test_mma_rounds_once_and_keeps_what_is_not_finite():
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    a[0, :3], b[:3, 0] = (1, 1, 1), (1024, 2.0**-14, 2.0**-14)  # each alone would be lost in fp32
    a[1, 3], b[3, 0] = np.inf, 1
    a[2, 4], b[4, 1] = np.inf, 0  # NaN: also 0 x inf in the other columns
    d = multiply("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
                 words(fragment(a.astype(np.float16), a_16, 8)),
                 words(fragment(b.astype(np.float16), b_16, 4)),
                 words(fragment(c.astype(np.float32), c_any, 4)), 4)  # fmt: skip
    found = unfragment(d.view(np.float32), c_any, (16, 8))
    assert found[0, 0] == 1024 + 2.0**-13
    assert found[1, 0] == np.inf and np.isnan(found[2, 1]) and not found[3:].any()


@pytest.mark.parametrize("opcode", [
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16",
    "mma.sync.aligned.m16n8k16.row.col.bf16.bf16.bf16.bf16",
    "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
])  # fmt: skip
def test_mma_refuses_other_forms(opcode):
    with pytest.raises(Unsupported, match=r"PTX line \d+: mma"):
        multiply(opcode, *(np.zeros((32, n), np.uint32) for n in (4, 2, 4)), 4)


def test_mma_refuses_a_warp_that_lost_lanes():
    body = """.reg .b32 %a<4>, %t; .reg .f32 %d<4>; .reg .pred %p;
    mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 3; @%p ret;
    mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%d0,%d1,%d2,%d3}, {%a0,%a1}, {%a2}, {%d0,%d1,%d2,%d3};
    """
    with pytest.raises(MachineError, match="without all of its 32 lanes"):
        execute(body, target="sm_80")


# ---- ldmatrix, stmatrix

WARPS = 2
# each thread copies 16 bytes to shared memory, then lane l gives the address of row l
HEAD = """
.reg .b32 %r<8>, %t, %w, %s; .reg .b64 %q;
mov.u32 %t, %tid.x;
shl.b32 %s, %t, 4;
mov.u32 %w, memory;
add.u32 %s, %s, %w;
ld.param.u64 %q, [p0];
mad.wide.u32 %q, %t, 16, %q;
"""
FILL = """ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%q];
st.shared.v4.b32 [%s], {%r0, %r1, %r2, %r3};
"""


def tail(count):
    given = "".join(f"st.global.b32 [%q+{4 * n}], %r{4 + n};\n" for n in range(count))
    return f"ld.param.u64 %q, [p1];\nmad.wide.u32 %q, %t, {4 * count}, %q;\n{given}"


def listed(count):
    return "{" + ", ".join(f"%r{4 + n}" for n in range(count)) + "}"


def rows_in():
    """Halves (warps, 4 matrices, 8 rows, 8 columns), all different."""
    return np.arange(WARPS * 256, dtype=np.uint16).reshape(WARPS, 4, 8, 8)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_ldmatrix_gives_each_lane_its_two_elements(count, trans, space):
    given, found = rows_in(), np.zeros((WARPS, 32, count, 2), np.uint16)
    name = f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.{space}.b16"
    body = HEAD + FILL + f"{name} {listed(count)}, [%s];\n"
    execute(body + tail(count), given, found, threads=32 * WARPS, shared=2048, target="sm_80")
    for warp, lane, n, i in np.ndindex(found.shape):
        place = (lane // 4, lane % 4 * 2 + i)
        row, column = place[::-1] if trans else place
        assert found[warp, lane, n, i] == given[warp, n, row, column]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_stmatrix_puts_each_lanes_two_elements(count, trans):
    given = np.arange(WARPS * 32 * 8, dtype=np.uint16).reshape(WARPS, 32, 4, 2)
    found = np.zeros((WARPS, 4, 8, 8), np.uint16)
    name = f"stmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    body = (
        HEAD
        + f"""
    ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%q];
    mov.u32 %r0, 0; st.shared.v4.b32 [%s], {{%r0, %r0, %r0, %r0}};
    {name} [%s], {listed(count)};
    ld.param.u64 %q, [p1]; mad.wide.u32 %q, %t, 16, %q;
    ld.shared.v4.b32 {{%r0, %r1, %r2, %r3}}, [%s];
    st.global.v4.b32 [%q], {{%r0, %r1, %r2, %r3}};
    """
    )
    execute(body, given, found, threads=32 * WARPS, shared=2048)
    wanted = np.zeros_like(found)
    for warp, lane, n, i in np.ndindex(WARPS, 32, count, 2):
        place = (lane // 4, lane % 4 * 2 + i)
        row, column = place[::-1] if trans else place
        wanted[warp, n, row, column] = given[warp, lane, n, i]
    np.testing.assert_array_equal(found, wanted)


def load_program(before=FILL, address="%s"):
    body = HEAD + before
    return body + f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {listed(4)}, [{address}];\n"


@pytest.mark.parametrize("before, address, message", [
    ("", "%s", "which nobody wrote"),
    (FILL, "%s+8", "no multiple of 16"),
    (FILL, "%s+1024", "outside the block's 1024 bytes"),
])  # fmt: skip
def test_ldmatrix_checks_its_rows(before, address, message):
    with pytest.raises(BadAccess, match=message):
        execute(load_program(before, address), rows_in(), threads=64, shared=1024, target="sm_80")


def test_ldmatrix_of_another_warps_rows_needs_a_barrier():
    away = "xor.b32 %s, %s, 512;\n"
    with pytest.raises(Race, match=r"warp . reads byte"):
        execute(load_program(FILL + away), rows_in(), threads=64, shared=1024, target="sm_80")


def test_ldmatrix_counts_its_conflicts():
    """32 rows in 8 columns of 128 bytes: each pass of 8 rows takes all banks once; with a stride
    of 128 bytes eight rows meet in four banks."""
    data = np.zeros((32, 8), np.uint16)
    straight = execute(load_program(), data, shared=8192, counted=True, target="sm_80")
    assert straight.wavefronts == straight.free
    steep = (
        FILL
        + "shl.b32 %r0, %t, 7; add.u32 %s, %w, %r0; st.shared.v4.b32 [%s], {%r0, %r0, %r0, %r0};"
    )
    counts = execute(load_program(steep), data, shared=8192, counted=True, target="sm_80")
    assert counts.free == 12 and counts.wavefronts == 4 + 2 * 32


def test_stmatrix_needs_sm_90_and_matrices_refuse_other_forms():
    for opcode, target in (
        ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%s], {%r0}", "sm_80"),
        ("stmatrix.sync.aligned.m16n8.x1.shared.b8 [%s], {%r0}", "sm_90"),
        ("ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%s]", "sm_90"),  # a generic address
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%s]", "sm_90"),
    ):
        with pytest.raises(Unsupported, match="PTX line"):
            execute(".reg .b32 %r0, %s;\n" + opcode + ";", target=target, shared=1024)


def test_ldmatrix_in_every_order_of_warps_is_the_same():
    given = [np.zeros((WARPS, 32, 4, 2), np.uint16) for _ in range(2)]
    for found, mode in zip(given, (Mode(), Mode(shuffled=True, seed=3))):
        execute(load_program() + tail(4), rows_in(), found, threads=64, shared=1024, mode=mode,
                target="sm_80")  # fmt: skip
    np.testing.assert_array_equal(*given)
