"""The arithmetic and the layouts of ``wgmma.mma_async``, against numbers of the PTX manual."""

import numpy as np
import pytest

from . import wgmma_programs as programs
from .errors import BadAccess, Unsupported
from .machine import EARLY, Mode
from .wgmma_programs import COMMIT, FENCE, MEMORY, WAIT, names
from .wgmma_tiles import Descriptor, Shape, addresses

SIZES = {"f16": 2, "bf16": 2, "tf32": 4}
MODES = [Mode(), Mode(late=True), Mode(late=True, shuffled=True, seed=3)]


class Tile:
    """A matrix of small whole numbers in shared memory, and its descriptor."""

    def __init__(self, image, values, type_: str, start: int, k_major: bool, width: int):
        size = SIZES[type_]
        self.values, atom = values, 8 * (width or 16)
        rows_in_atom = 8 if k_major else max(1, width // 16) * 16 // size
        along = -(-len(values) // rows_in_atom)
        if k_major and width == 0:  # two units along K: leading
            self.leading, self.stride = along * 128 + 128, 128
        elif k_major:
            self.leading, self.stride = 16, atom
        elif width == 0:
            self.leading, self.stride = along * 128 + 128, 128
        else:
            self.leading, self.stride = atom, along * atom
        given = (start, k_major, width, self.leading, self.stride)
        programs.place(image, programs.bits(values, type_), *given)
        self.descriptor = programs.descriptor(start, width, self.leading, self.stride)


def whole_numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float64)


def product(columns: int, type_: str, trans=(0, 0), width: int = 128, in_registers: bool = False,
            scales=(1, 1), scale_d: str = "1", d_type: str = "f32", mode: Mode = EARLY):  # fmt: skip
    """(D of the machine, D of numpy), both (registers, 128)."""
    depth = 32 // SIZES[type_]
    a, b = whole_numbers(1, 64, depth), whole_numbers(2, columns, depth)
    d = whole_numbers(3, 64, columns)
    image = np.full(-(-(64 * 128 + columns * 128 + 2048) // 2048) * 2048, 0xFF, np.uint8)
    tile_a = Tile(image, a, type_, MEMORY, not trans[0], width)
    tile_b = Tile(image, b, type_, MEMORY + 64 * 128 + 1024, not trans[1], width)
    held = programs.a_registers(programs.bits(a, type_))
    first = names("a", 4) if in_registers else "%q6"
    flags = (
        "" if type_ == "tf32" else f", {trans[1]}" if in_registers else f", {trans[0]}, {trans[1]}"
    )
    registers = columns // (2 if d_type == "f32" else 4)
    text = f"""
mov.b64 %q6, {tile_a.descriptor};
mov.b64 %q7, {tile_b.descriptor};
setp.ne.s32 %p0, 1, 1;
setp.eq.s32 %p1, 1, 1;
{FENCE}
wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.{d_type}.{type_}.{type_}
{names("d", registers)}, {first}, %q7, {scale_d}, {scales[0]}, {scales[1]}{flags};
{COMMIT}{WAIT}"""
    before, signs = programs.accumulators(d), scales[0] * scales[1]
    expected = programs.accumulators(signs * (a @ b.T) + d * (scale_d in ("1", "%p1")))
    if d_type == "f16":
        before, expected = (halves(each) for each in (before, expected))
    else:
        before, expected = (each.astype(np.float32).view(np.uint32) for each in (before, expected))
    return programs.run(image, held, before, text, mode=mode), expected


def halves(registers: np.ndarray) -> np.ndarray:
    """(N / 2, 128) values as (N / 4, 128) registers of two halves."""
    pairs = registers.astype(np.float16).view(np.uint16).astype(np.uint32)
    return pairs[0::2] | pairs[1::2] << 16


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal as floats: a zero may have either sign."""
    assert found.shape == expected.shape
    assert np.array_equal(found.view(np.float32), expected.view(np.float32))


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_product_of_every_layout(width, trans):
    same(*product(64, "bf16", trans, width))


@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_product_of_tf32(width):
    same(*product(32, "tf32", width=width))
    same(*product(16, "tf32", width=width, in_registers=True))


@pytest.mark.parametrize("columns", [8, 16, 24, 128, 256])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_product_of_widths(columns, mode):
    same(*product(columns, "f16", (0, 1 if columns % 64 == 0 else 0), mode=mode))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32"])
def test_product_with_a_in_registers(type_, mode):
    same(*product(32, type_, in_registers=True, mode=mode))


def test_product_of_transposed_b_with_a_in_registers():
    same(*product(128, "bf16", (0, 1), in_registers=True))


@pytest.mark.parametrize("scale_d", ["0", "%p0", "%p1"])
def test_product_that_adds_or_not(scale_d):
    same(*product(16, "bf16", scale_d=scale_d))


@pytest.mark.parametrize("scales", [(-1, 1), (1, -1), (-1, -1)])
def test_product_of_negated_operands(scales):
    same(*product(16, "f16", scales=scales))


def test_product_with_half_accumulators():
    found, expected = product(32, "f16", d_type="f16")
    assert np.array_equal(found.view(np.float16), expected.view(np.float16))


def test_tf32_ignores_the_low_bits():
    image = np.full(4096, 0xFF, np.uint8)
    ones = np.full((64, 8), np.float32(1).view(np.uint32) | 0x1FFF, np.uint32)
    for start, rows in ((MEMORY, 64), (MEMORY + 2048, 8)):
        programs.place(image, ones[:rows], start, True, 32, 16, 256)
    a, b = (programs.descriptor(start, 32, 16, 256) for start in (MEMORY, MEMORY + 2048))
    text = f"""mov.b64 %q6, {a};\nmov.b64 %q7, {b};\n{FENCE}
wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {names("d", 4)}, %q6, %q7, 0, 1, 1;
{COMMIT}{WAIT}"""
    zeros = np.zeros((4, 128), np.uint32)
    assert (programs.run(image, zeros, zeros, text).view(np.float32) == 8).all()


# ---- descriptors: the manual's figures 167, 168, 169 and 170, in elements


@pytest.mark.parametrize(
    "width, leading, stride, shape, place",
    [
        (32, 16, 256, Shape(16, 4, True), lambda r, k: r % 8 * 8 + r // 8 * 64 + k),
        (0, 256, 128, Shape(16, 2, False), lambda r, k: r % 8 + r // 8 * 64 + k % 8 * 8 + k // 8 * 128),
        (32, 256, 512, Shape(32, 2, False), lambda r, k: r % 16 + r // 16 * 128 + k % 8 * 16 + k // 8 * 256),
        (64, 512, 1024, Shape(64, 2, False), lambda r, k: r % 32 + r // 32 * 256 + k % 8 * 32 + k // 8 * 512),
    ],
)  # fmt: skip
def test_addresses_of_the_figures(width, leading, stride, shape, place):
    found = addresses(programs.descriptor(MEMORY, width, leading, stride), shape)
    unit = 16 // shape.size
    for (one, two), address in np.ndenumerate(found):
        row, k = (one, two * unit) if shape.k_major else (one * unit, two)
        plain = MEMORY + shape.size * place(row, k)
        assert address == programs.swizzled(plain, width)


def test_second_step_along_k_stays_in_the_swizzle():
    """32 bytes on, K-major: row 1 of the 128-byte swizzle has its units 2 and 3 at 3 and 2."""
    bits = programs.descriptor(MEMORY + 32, 128, 16, 1024)
    assert addresses(bits, Shape(8, 2, True))[1].tolist() == [MEMORY + 128 + 48, MEMORY + 128 + 32]


@pytest.mark.parametrize(
    "bits, shape, said",
    [
        (programs.descriptor(MEMORY, 128, 16, 1024) | 1 << 49, Shape(8, 2, True), "base offset 1"),
        (programs.descriptor(MEMORY, 128, 16, 1024) | 1 << 52, Shape(8, 2, True), "no meaning"),
        (programs.descriptor(MEMORY + 128, 128, 16, 1024), Shape(8, 2, True), "multiples of 1024"),
        (programs.descriptor(MEMORY, 64, 16, 640), Shape(16, 2, True), "multiples of 512"),
        (programs.descriptor(MEMORY + 112, 128, 16, 1024), Shape(8, 2, True), "from byte 112"),
        (programs.descriptor(MEMORY, 32, 128, 256), Shape(32, 2, False), "multiples of 256"),
        (programs.descriptor(MEMORY + 16, 32, 256, 256), Shape(16, 2, False), "from byte 16"),
    ],
)
def test_descriptor_that_is_wrong(bits, shape, said):
    with pytest.raises(BadAccess, match=said):
        addresses(bits, shape)


def test_descriptor_fields():
    assert Descriptor.of(0x4000004000010000 | 0x64) == Descriptor(0x640, 16, 1024, 0, 128)


@pytest.mark.parametrize(
    "line",
    [
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k8.f32.f16.f16 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k16.f16.bf16.bf16 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {D}, %q6, %q7, 1, 2, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.mma_async.sp.sync.aligned.m64n16k32.f32.f16.f16 {D}, %q6, %q7, 1, 1, 1, 0, 0;",
        "wgmma.fence.aligned;",
        "wgmma.wait_group.sync.aligned;",
    ],
)
def test_form_that_is_not_known(line):
    image, zeros = np.zeros(2048, np.uint8), np.zeros((8, 128), np.uint32)
    with pytest.raises(Unsupported):
        programs.run(image, zeros[:4], zeros, line.replace("{D}", names("d", 8)))
