"""What the tests of bulk copies share: aligned arrays, tensor maps in them, and a program."""

import numpy as np

from .machine import EARLY, Mode
from .programs import execute
from .tensor_maps import TensorMap

BARRIER = 16384  # of shared memory, above the boxes
LOAD = "cp.async.bulk.tensor.{n}d.shared::cluster.global.mbarrier::complete_tx::bytes"
STORE = "cp.async.bulk.tensor.{n}d.global.shared::cta.bulk_group"

CODES = {np.dtype(np.uint8): 0, np.dtype(np.uint16): 1, np.dtype(np.uint32): 2,
         np.dtype(np.uint64): 4, np.dtype(np.float16): 6, np.dtype(np.float32): 7}  # fmt: skip
SWIZZLE_MODES = {0: 0, 32: 1, 64: 2, 128: 3}

HEAD = """
.reg .b16 %h<8>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<8>;
mov.b32 %r0, memory;
mov.u32 %r1, %tid.x;
setp.eq.u32 %p0, %r1, 0;
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd1, [p1];
"""  # %r0: shared memory; %rd0, %rd1: the first two arrays; thread 0 has %p0


def aligned(shape: tuple[int, ...] | int, dtype=np.uint8, align: int = 128) -> np.ndarray:
    """Zeros at a multiple of ``align``."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    whole = np.zeros(size + align, np.uint8)
    start = -whole.ctypes.data % align
    return whole[start : start + size].view(dtype).reshape(shape)


def counting(shape: tuple[int, ...], dtype=np.uint16) -> np.ndarray:
    """1, 2, 3, ..."""
    array = aligned(shape, dtype)
    array[...] = np.arange(1, array.size + 1).reshape(shape)
    return array


def map_of(array: np.ndarray, box: tuple[int, ...], swizzle: int = 0, **changes) -> np.ndarray:
    """A tensor map, 128 aligned bytes, of an array (outermost first) and a box (innermost first)."""
    given = dict(
        address=array.ctypes.data, element=CODES[array.dtype], sizes=array.shape[::-1],
        strides=array.strides[::-1][1:], box=box, element_strides=(1,) * array.ndim,
        swizzle=SWIZZLE_MODES[swizzle],
    )  # fmt: skip
    packed = aligned(128)
    packed[:] = np.frombuffer(TensorMap(**{**given, **changes}).pack(), np.uint8)
    return packed


def wait(barrier: str, parity: int = 0, name: str = "WAIT") -> str:
    """Wait for a phase of the mbarrier at a register's address."""
    return f"""
    {name}: mbarrier.try_wait.parity.shared.b64 %p7, [{barrier}], {parity};
    @!%p7 bra {name};
    """


def to_global(size: int, address: str = "%rd1") -> str:
    """32 threads copy ``size`` bytes from the start of shared memory, 16 bytes at a time."""
    return f"""
    shl.b32 %r15, %r1, 4;
    cvt.u64.u32 %rd15, %r15;
    add.u64 %rd15, %rd15, {address};
    add.u32 %r15, %r15, %r0;
    mov.u32 %r14, %r1;
    COPY: setp.ge.u32 %p6, %r14, {size // 16};
    @%p6 bra COPIED;
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r15];
    st.global.v4.u32 [%rd15], {{%r10, %r11, %r12, %r13}};
    add.u32 %r15, %r15, 512;
    add.u64 %rd15, %rd15, 512;
    add.u32 %r14, %r14, 32;
    bra.uni COPY;
    COPIED:
    """


def from_global(size: int, address: str = "%rd1") -> str:
    """The other way."""
    words = "{%r10, %r11, %r12, %r13}"
    load, store = f"ld.shared.v4.u32 {words}, [%r15];", f"st.global.v4.u32 [%rd15], {words};"
    return (
        to_global(size, address)
        .replace(load, f"ld.global.v4.u32 {words}, [%rd15];")
        .replace(store, f"st.shared.v4.u32 [%r15], {words};")
    )


def load_program(size: int, at: tuple[int, ...]) -> str:
    """Load one box to the start of shared memory and copy it to the second array."""
    place = ", ".join(map(str, at))
    return (
        HEAD
        + f"""
    add.u32 %r2, %r0, {BARRIER};
    @%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], {size};
    @%p0 {LOAD.format(n=len(at))} [%r0], [%rd0, {{{place}}}], [%r2];
    {wait("%r2")} {to_global(size)}
    """
    )


def loaded(program: str, packed, source, size: int, mode: Mode = EARLY, **kwargs):
    """What a ``load_program`` of ``size`` bytes brought, and the counts."""
    out = aligned(size)
    counts = execute(program, packed, out, source, shared=BARRIER + 64, mode=mode, **kwargs)
    return out, counts


def store_program(size: int, at: tuple[int, ...], fence: str = "fence.proxy.async.shared::cta;",
                  end: str = "cp.async.bulk.wait_group.read 0;") -> str:  # fmt: skip
    """Copy the second array to shared memory and store it as one box."""
    place = ", ".join(map(str, at))
    return (
        HEAD
        + f"""
    {from_global(size)}
    {fence}
    bar.sync 0;
    @%p0 {STORE.format(n=len(at))} [%rd0, {{{place}}}], [%r0];
    cp.async.bulk.commit_group;
    {end}
    """
    )
