"""cvt: against fractions, and against the limits and special cases of PTX ISA 9.7.9.21."""

from fractions import Fraction

import numpy as np
import pytest

from .errors import Unsupported
from .expected import apply, number, random_bits, rounded

INF, NAN = np.inf, np.nan


def f32(*values):
    return np.array(values, np.float32)


def values(bits, type_):
    return [number(int(x), type_) for x in bits]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to, origin", [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"),
                                        ("bf16", "f64"), ("bf16", "f16"), ("f16", "bf16")])  # fmt: skip
def test_narrowing_rounds_once(to, origin, mode):
    bits = np.concatenate([random_bits(origin, 256, 1, near=16 if origin != "f16" else 14),
                           random_bits(origin, 256, 2)])  # fmt: skip
    bits[0] = 0
    found = apply(f"cvt.{mode}.{to}.{origin} d, a;", bits,
                  result={"f32": np.uint32}.get(to, np.uint16))  # fmt: skip
    wanted = [rounded(Fraction(x), to, mode) for x in values(bits, origin)]
    assert values(found, to) == wanted


def test_a_subnormal_bf16_is_rounded_once_from_fp64():
    # 2^-134 is the tie of 0 and the least bf16; fp32 would lose the part above it
    a = np.array([2.0**-134 * (1 + 2.0**-40), 2.0**-134, -(2.0**-134) * (1 + 2.0**-40)])
    assert apply("cvt.rn.bf16.f64 d, a;", a, result=np.uint16).tolist() == [1, 0, 0x8001]


def test_bf16_ties_go_to_even():
    a = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x80000000, 0xFF800000, 0x00008000,
                  0x00018000], np.uint32)  # fmt: skip
    found = apply("cvt.rn.bf16.f32 d, a;", a, result=np.uint16)
    assert found.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x8000, 0xFF80, 0x0000, 0x0002]


def test_nans_become_the_canonical_one():
    nans = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    for to in ("f16", "bf16"):
        for mode in ("rn", "rz", "rn.relu", "rn.satfinite"):
            found = apply(f"cvt.{mode}.{to}.f32 d, a;", nans, result=np.uint16)
            assert found.tolist() == [0x7FFF] * 3, (to, mode)
    assert apply("cvt.rna.tf32.f32 d, a;", nans).tolist() == [0x7FFFFFFF] * 3


def test_relu_and_satfinite():
    a = f32(-2, -0.0, 3, INF, -INF, 1e6)
    found = apply("cvt.rn.relu.f16.f32 d, a;", a, result=np.uint16)
    assert found.tolist() == [0, 0, 0x4200, 0x7C00, 0, 0x7C00]
    found = apply("cvt.rn.satfinite.f16.f32 d, a;", a, result=np.uint16)
    assert found.tolist() == [0xC000, 0x8000, 0x4200, 0x7BFF, 0xFBFF, 0x7BFF]
    found = apply("cvt.rn.relu.satfinite.bf16.f32 d, a;", a, result=np.uint16)
    assert found.tolist() == [0, 0, 0x4040, 0x7F7F, 0, 0x4974]


def test_of_a_pair_the_first_operand_is_the_high_half():
    one, two = f32(1, NAN, -1), f32(2, -0.0, 65520)
    found = apply("cvt.rn.bf16x2.f32 d, a, b;", one, two)
    assert found.tolist() == [0x3F804000, 0x7FFF8000, 0xBF804780]
    found = apply("cvt.rn.f16x2.f32 d, a, b;", one, two)
    assert found.tolist() == [0x3C004000, 0x7FFF8000, 0xBC007C00]
    found = apply("cvt.rz.f16x2.f32 d, a, b;", one, two)
    assert found.tolist() == [0x3C004000, 0x7FFF8000, 0xBC007BFF]
    found = apply("cvt.rn.relu.bf16x2.f32 d, a, b;", one, two)
    assert found.tolist() == [0x3F804000, 0x7FFF0000, 0x00004780]
    found = apply("cvt.rn.satfinite.f16x2.f32 d, a, b;", one, two)
    assert found.tolist() == [0x3C004000, 0x7FFF8000, 0xBC007BFF]


@pytest.mark.parametrize("origin", ["f16", "bf16"])
def test_every_16_bit_float_widens_exactly(origin):
    bits = np.arange(0, 65536, 64, dtype=np.uint16) | np.uint16(1)
    found = apply(f"cvt.f32.{origin} d, a;", bits, result=np.float32)
    wanted = np.array(values(bits, origin))
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found), bits >= 0x8000)


def test_fp64_and_ftz():
    a = f32(2.0**-149, -(2.0**-127), 1.5)
    assert apply("cvt.f64.f32 d, a;", a, result=np.float64).tolist() == a.astype(float).tolist()
    found = apply("cvt.ftz.f64.f32 d, a;", a, result=np.float64)
    assert found.tolist() == [0, 0, 1.5] and np.signbit(found[1])
    wide = np.array([2.0**-127, -(2.0**-149), 1 + 2.0**-24, 1e300])
    assert apply("cvt.rn.f32.f64 d, a;", wide, result=np.float32).tolist() == [2.0**-127, -(2.0**-149), 1, INF]  # fmt: skip
    assert apply("cvt.rn.ftz.f32.f64 d, a;", wide, result=np.float32).tolist() == [0, 0, 1, INF]
    found = apply("cvt.sat.f32.f32 d, a;", f32(-1, 0.5, 2, NAN), result=np.float32)
    assert found.tolist() == [0, 0.5, 1, 0]


def test_tf32_ties_go_away_from_zero():
    a = np.array([0x3F801000, 0xBF801000, 0x3F800FFF, 0x3F803000, 0x7F800000, 0x7F7FFFFF], np.uint32)  # fmt: skip
    found = apply("cvt.rna.tf32.f32 d, a;", a)
    assert found.tolist() == [0x3F802000, 0xBF802000, 0x3F800000, 0x3F804000, 0x7F800000, 0x7F800000]  # fmt: skip
    found = apply("cvt.rn.tf32.f32 d, a;", a)
    assert found.tolist() == [0x3F800000, 0xBF800000, 0x3F800000, 0x3F804000, 0x7F800000, 0x7F800000]  # fmt: skip
    assert apply("cvt.rna.satfinite.tf32.f32 d, a;", a[4:]).tolist() == [0x7F7FE000] * 2


def test_floats_to_whole_numbers():
    a = f32(2.5, 3.5, -2.5, -0.5, 0.7, -0.7)
    for mode, wanted in (("rni", [2, 4, -2, 0, 1, -1]), ("rzi", [2, 3, -2, 0, 0, 0]),
                         ("rmi", [2, 3, -3, -1, 0, -1]), ("rpi", [3, 4, -2, 0, 1, 0])):  # fmt: skip
        assert apply(f"cvt.{mode}.s32.f32 d, a;", a, result=np.int32).tolist() == wanted
        found = apply(f"cvt.{mode}.f32.f32 d, a;", a, result=np.float32)
        assert found.tolist() == wanted and np.signbit(found[3])  # -0 or -1
        found = apply(f"cvt.{mode}.s64.f64 d, a;", a.astype(float), result=np.int64)
        assert found.tolist() == wanted


def test_floats_beyond_an_integer_saturate():
    a = f32(INF, -INF, 3e9, -3e9, 2.0**32, -1, NAN)
    top, bottom = 2**31 - 1, -(2**31)
    assert apply("cvt.rzi.s32.f32 d, a;", a, result=np.int32).tolist() == [top, bottom, top, bottom, top, -1, 0]  # fmt: skip
    assert apply("cvt.rzi.u32.f32 d, a;", a).tolist() == [2**32 - 1, 0, 3 * 10**9, 0, 2**32 - 1, 0, 0]  # fmt: skip
    assert apply("cvt.rzi.u8.f32 d, a;", a).tolist() == [255, 0, 255, 0, 255, 0, 0]
    assert apply("cvt.rzi.s16.f32 d, a;", a, result=np.int16).tolist() == [32767, -32768, 32767, -32768, 32767, -1, 0]  # fmt: skip
    b = f32(2.0**63, -(2.0**63), -(2.0**64), 2.0**64, NAN)
    assert apply("cvt.rzi.s64.f32 d, a;", b, result=np.int64).tolist() == [2**63 - 1, -(2**63), -(2**63), 2**63 - 1, -(2**63)]  # fmt: skip
    assert apply("cvt.rzi.u64.f32 d, a;", b, result=np.uint64).tolist() == [2**63, 0, 0, 2**64 - 1, 2**63]  # fmt: skip
    assert apply("cvt.rzi.s32.f64 d, a;", b.astype(float), result=np.int32).tolist()[-1] == bottom
    halves = np.array([0x7C00, 0xFC00, 0x7E00, 0xC500], np.uint16)
    assert apply("cvt.rzi.s32.f16 d, a;", halves, result=np.int32).tolist() == [top, bottom, 0, -5]
    assert apply("cvt.rni.s32.bf16 d, a;", np.array([0xC020], np.uint16), result=np.int32)[0] == -2


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("origin, dtype", [("s32", np.int32), ("u32", np.uint32), ("s64", np.int64),
                                           ("u64", np.uint64), ("s16", np.int16)])  # fmt: skip
def test_integers_to_floats_round_once(origin, dtype, mode):
    limits, random = np.iinfo(dtype), np.random.default_rng(4)
    a = random.integers(limits.min, limits.max, 300, dtype, endpoint=True)
    a = np.concatenate([a >> random.integers(0, limits.bits, 300).astype(dtype),
                        np.array([0, 1, limits.max, limits.min, limits.max - 1], dtype)])  # fmt: skip
    if limits.bits > 16:
        a = np.concatenate([a, np.array([2**24 + 1, 2**24 + 3, 2**30 + 64, 2**30 + 65], dtype)])
    if limits.bits > 32:
        ties = [2**60 + 2**36, 2**60 + 2**36 + 1, 2**60 + 3 * 2**36, 2**60 + 2**36 - 1]
        a = np.concatenate([a, np.array(ties, dtype)])
    for to, result in (("f32", np.uint32), ("f16", np.uint16), ("bf16", np.uint16)):
        found = apply(f"cvt.{mode}.{to}.{origin} d, a;", a, result=result)
        wanted = [rounded(Fraction(x), to, mode) for x in a.tolist()]
        assert values(found, to) == wanted, to


def test_integers_to_fp64():
    a = np.array([2**53 + 1, -(2**53) - 3, 2**63 - 1], np.int64)
    wanted = [rounded(Fraction(x), "f64") for x in a.tolist()]
    assert apply("cvt.rn.f64.s64 d, a;", a, result=np.float64).tolist() == wanted
    a = np.array([-5, 7], np.int32)
    assert apply("cvt.rn.f64.s32 d, a;", a, result=np.float64).tolist() == [-5, 7]
    assert apply("cvt.rn.sat.f32.s32 d, a;", a, result=np.float32).tolist() == [0, 1]


def test_integers_to_integers():
    a = np.array([0xFFFFFF80, 0x0000017F, 0x80000000], np.uint32)
    assert apply("cvt.s64.s32 d, a;", a, result=np.int64).tolist() == [-128, 383, -(2**31)]
    assert apply("cvt.u64.u32 d, a;", a, result=np.uint64).tolist() == a.tolist()
    assert apply("cvt.u64.s32 d, a;", a, result=np.uint64).tolist() == [2**64 - 128, 383, 2**64 - 2**31]  # fmt: skip
    assert apply("cvt.u16.u32 d, a;", a, result=np.uint16).tolist() == [0xFF80, 0x17F, 0]
    # a wider register gets the value extended by the sign of the result's type
    assert apply("cvt.s8.u32 d, a;", a, result=np.int32).tolist() == [-128, 127, 0]
    assert apply("cvt.u8.s32 d, a;", a).tolist() == [0x80, 0x7F, 0]
    assert apply("cvt.s32.s8 d, a;", a, result=np.int32).tolist() == [-128, 127, 0]


def test_integers_to_integers_saturate():
    a = np.array([-129, 300, -1, 2**31 - 1], np.int32)
    assert apply("cvt.sat.s8.s32 d, a;", a, result=np.int32).tolist() == [-128, 127, -1, 127]
    assert apply("cvt.sat.u8.s32 d, a;", a).tolist() == [0, 255, 0, 255]
    assert apply("cvt.sat.u32.s32 d, a;", a).tolist() == [0, 300, 0, 2**31 - 1]
    assert apply("cvt.sat.s32.u32 d, a;", a, result=np.int32).tolist() == [2**31 - 1, 300, 2**31 - 1, 2**31 - 1]  # fmt: skip
    assert apply("cvt.sat.u64.s32 d, a;", a, result=np.uint64).tolist() == [0, 300, 0, 2**31 - 1]


REFUSED = ["cvt.f16.f32 d, a;", "cvt.rn.f64.f32 d, a;", "cvt.s32.f32 d, a;", "cvt.f32.s32 d, a;",
           "cvt.rn.satfinite.e4m3x2.f32 d, a, b;", "cvt.rna.f16.f32 d, a;", "cvt.rs.f16x2.f32 d, a, b, c;",
           "cvt.rn.f32.f16 d, a;", "cvt.rn.relu.f32.f64 d, a;", "cvt.rn.sat.bf16.f32 d, a;",
           "cvt.rzi.f32.f16 d, a;", "cvt.rn.rz.f16.f32 d, a;", "cvt.pack.sat.u8.s32 d, a, b;",
           "cvt.rn.s32.s16 d, a;"]  # fmt: skip


@pytest.mark.parametrize("line", REFUSED)
def test_unknown_conversions_are_refused(line):
    with pytest.raises(Unsupported, match="PTX line"):
        apply(line, *[np.zeros(32, np.uint32)] * 3)
