"""Programs of the wgmma tests, and where the PTX manual says that elements are.

Nothing here is taken from the code under test: the layouts are the canonical ones of the manual's
section 9.7.15.5.1.2.1.3, as CuTe shapes and strides in elements.
"""

import numpy as np

from .machine import EARLY, Mode
from .programs import execute

MEMORY = 1024  # the address of ``memory``
THREADS = np.arange(128)[None, :]


def canonical(k_major: bool, width: int, unit: int, leading: int, stride: int):
    """The strides of a (row, k) place: two lists of (extent, stride), in elements, inner first."""
    if k_major and width == 0:
        return [(8, unit), (None, stride)], [(unit, 1), (None, leading)]
    if k_major:
        return [(8, width // 16 * unit), (None, stride)], [(unit, 1), (None, unit)]
    if width == 0:
        return [(unit, 1), (1, unit), (None, stride)], [(8, unit), (None, leading)]
    wide = width // 16
    return [(unit, 1), (wide, unit), (None, leading)], [(8, wide * unit), (None, stride)]


def _along(parts, place: int) -> int:
    """The offset of a place along nested extents."""
    offset = 0
    for extent, stride in parts:
        inner, place = (place, 0) if extent is None else (place % extent, place // extent)
        offset += inner * stride
    return offset


def swizzled(address: int, width: int) -> int:
    """Swizzle<B, 4, 3> of a byte address, B being 0, 1, 2, 3 for 0, 32, 64, 128 bytes."""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    return address ^ (address >> 7 & (1 << bits) - 1) << 4


def place(image, elements, start: int, k_major: bool, width: int, leading: int, stride: int):
    """Put a (rows, depth) matrix of unsigned elements into the bytes of ``memory``."""
    size = elements.itemsize
    rows, ks = canonical(k_major, width, 16 // size, leading // size, stride // size)
    view = image.view(elements.dtype)
    for (row, k), value in np.ndenumerate(elements):
        at = start + size * (_along(rows, row) + _along(ks, k))
        view[(swizzled(at, width) - MEMORY) // size] = value


def descriptor(start: int, width: int, leading: int, stride: int) -> int:
    """The 64 bits of a matrix descriptor: section 9.7.15.5.1.2.2."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | mode << 62


def accumulators(matrix: np.ndarray) -> np.ndarray:
    """A (64, N) matrix as (N / 2, 128) registers: figure of D for m64nNk16."""
    n = np.arange(matrix.shape[1] // 2)[:, None]
    rows = 16 * (THREADS // 32) + THREADS % 32 // 4 + 8 * (n % 4 // 2)
    return np.ascontiguousarray(matrix[rows, 8 * (n // 4) + 2 * (THREADS % 4) + n % 2])


def a_registers(elements: np.ndarray) -> np.ndarray:
    """(64, depth) elements as A's (4, 128) 32-bit registers."""
    found = np.zeros((4, 128), np.uint32)
    for n in range(4):
        rows = 16 * (THREADS // 32) + THREADS % 32 // 4 + 8 * (n % 2)
        if elements.itemsize == 4:
            found[n] = elements[rows, THREADS % 4 + 4 * (n // 2)]
            continue
        at = 2 * (THREADS % 4) + 8 * (n // 2)
        low, high = (elements[rows, at + b].astype(np.uint32) for b in (0, 1))
        found[n] = low | high << 16
    return found


def bits(values: np.ndarray, type_: str) -> np.ndarray:
    """Values that the type holds exactly, as its bits."""
    if type_ == "f16":
        return values.astype(np.float16).view(np.uint16)
    single = values.astype(np.float32).view(np.uint32)
    return (single >> 16).astype(np.uint16) if type_ == "bf16" else single


def names(letter: str, count: int) -> str:
    """``{%letter0, ...}``"""
    return "{" + ", ".join(f"%{letter}{n}" for n in range(count)) + "}"


def _per_thread(verb: str, letter: str, count: int, base: str) -> str:
    """Loads or stores of (count, 128) registers."""
    line = (
        "ld.global.b32 %{0}{1}, [{2}+{3}];" if verb == "ld" else "st.global.b32 [{2}+{3}], %{0}{1};"
    )
    return "\n".join(line.format(letter, n, base, 512 * n) for n in range(count))


FENCE = "wgmma.fence.sync.aligned;\n"
COMMIT = "wgmma.commit_group.sync.aligned;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;\n"
FILLED = "fence.proxy.async.shared::cta;\nbar.sync 0;\n"
STORE = "STORE"


def run(image, held, d, text: str, filled: str = FILLED, mode: Mode = EARLY) -> np.ndarray:
    """Copy ``image`` to shared memory, load A's registers ``held`` and D ``d`` (registers, 128),
    execute ``text``, and store D; the new D. A line STORE in the text stores it there instead."""
    image, held, d = image.copy(), held.copy(), d.copy()
    copies = "\n".join(
        f"ld.global.v4.b32 {names('v', 4)}, [%q5+{at}];\nst.shared.v4.b32 [%s1+{at}], {names('v', 4)};"
        for at in range(0, len(image), 2048)
    )
    store = _per_thread("st", "d", len(d), "%q4")
    after = store if STORE not in text else ""
    body = f"""
.reg .b32 %v<4>, %s<4>, %a<4>, %d<{len(d)}>;
.reg .b64 %q<12>;
.reg .pred %p<4>;
ld.param.u64 %q0, [p0];
ld.param.u64 %q1, [p1];
ld.param.u64 %q2, [p2];
mov.u32 %s0, %tid.x;
mul.wide.u32 %q3, %s0, 4;
add.s64 %q4, %q2, %q3;
add.s64 %q3, %q1, %q3;
mul.wide.u32 %q5, %s0, 16;
add.s64 %q5, %q5, %q0;
mov.u32 %s1, memory;
shl.b32 %s2, %s0, 4;
add.s32 %s1, %s1, %s2;
{copies}
{filled}
{_per_thread("ld", "a", 4, "%q3")}
{_per_thread("ld", "d", len(d), "%q4")}
{text.replace(STORE, store)}
{after}
"""
    execute(body, image, held, d, threads=128, shared=len(image), mode=mode)
    return d
