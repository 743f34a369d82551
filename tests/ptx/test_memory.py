"""Shared and global memory: bounds, alignment, what nobody wrote, and widths."""

import numpy as np
import pytest

from .errors import BadAccess
from .global_memory import Allocation, GlobalMemory
from .machine import Mode
from .programs import execute

HEAD = """
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<24>;
.reg .b64 %rd<8>;
ld.param.u64 %rd1, [p0];
ld.param.u64 %rd2, [p1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd3, %rd1, %rd3;
mul.wide.u32 %rd4, %r1, 16;
add.s64 %rd4, %rd1, %rd4;
mov.u32 %r5, memory;
shl.b32 %r6, %r1, 2; add.u32 %r6, %r5, %r6;
shl.b32 %r7, %r1, 4; add.u32 %r7, %r5, %r7;
"""


def run(body: str, given=None, out=None, **options):
    given = np.arange(128, dtype=np.uint32) if given is None else given
    out = np.zeros(128, np.uint32) if out is None else out
    execute(HEAD + body, given, out, **{"shared": 512, **options})
    return out


@pytest.mark.parametrize(
    "body, said",
    [
        ("ld.global.u32 %r2, [%rd3+388];", "4 bytes at 0x.* are in no allocation.* of 512 bytes, this is byte 512"),
        ("ld.global.u32 %r2, [%rd3+-4];", "are in no allocation"),
        ("st.global.u32 [%rd3+388], %r1;", "are in no allocation"),
        ("ld.global.v4.u32 {%r2, %r3, %r4, %r8}, [%rd4+16];", "16 bytes at .* are in no allocation"),
        ("mov.u64 %rd5, 0; ld.global.u32 %r2, [%rd5];", "4 bytes at 0x0 are in no allocation"),
        ("ld.global.u32 %r2, [%rd3+2];", "in global memory is no multiple of 4"),
        ("ld.global.v2.u32 {%r2, %r3}, [%rd3];", "no multiple of 8"),
        ("ld.shared.u32 %r2, [%r6+512];", "4 bytes at 0x.* are outside the block's 512 bytes"),
        ("mov.u32 %r2, 0; ld.shared.u32 %r2, [%r2];", "are outside the block's 512 bytes"),
        ("st.shared.u32 [%r6+388], %r1;", "are outside the block's 512 bytes"),
        ("st.shared.u32 [%r6+1], %r1;", "in shared memory is no multiple of 4"),
        ("st.shared.v4.u32 [%r6], {%r1, %r1, %r1, %r1};", "in shared memory is no multiple of 16"),
        ("ld.shared.u32 %r2, [%r6];", "of shared memory of block 0 of the group, which nobody wrote"),
        ("st.shared.u16 [%r6], %h1; ld.shared.u32 %r2, [%r6];", "reads byte 0x402 .* nobody wrote"),
        ("ld.shared::cluster.u32 %r2, [%r6+50331648];", "block 2 is not in a cluster of 1"),
    ],
)  # fmt: skip
def test_bad_accesses(body, said):
    for mode in (Mode(), Mode(shuffled=True)):
        with pytest.raises(BadAccess, match=rf"^PTX line \d+: .*\n.*{said}"):
            run(body, mode=mode)


def test_global_memory_that_nobody_wrote():
    with pytest.raises(BadAccess, match=r"reads byte 0 of p0 of 512 bytes, which nobody wrote"):
        run("ld.global.u32 %r2, [%rd3];", unwritten=(0,))
    with pytest.raises(BadAccess, match=r"reads byte 2 of p0"):
        run("st.global.u16 [%rd3], %h1; ld.global.u32 %r2, [%rd3];", unwritten=(0,))
    run("st.global.u32 [%rd3], %r1; ld.global.u32 %r2, [%rd3];", unwritten=(0,))
    with pytest.raises(BadAccess, match=r"reads byte 128 of p0"):
        run(
            "st.global.u32 [%rd3], %r1; ld.global.v4.u32 {%r2, %r3, %r4, %r8}, [%rd4];",
            unwritten=(0,),
        )


def test_accesses_of_several_allocations_at_once():
    """Even threads read p0, odd ones p1; the last reads past it."""
    body = """
    and.b32 %r2, %r1, 1; setp.eq.u32 %p1, %r2, 1; mul.wide.u32 %rd5, %r1, 4;
    @%p1 add.s64 %rd3, %rd2, %rd5; ld.global.u32 %r3, [%rd3]; add.u32 %r3, %r3, 1000;
    st.global.u32 [%rd3], %r3;
    """
    given, out = np.arange(128, dtype=np.uint32), np.arange(128, 256, dtype=np.uint32)
    run(body, given, out)
    expected = np.arange(128)
    expected[:32:2] += 1000
    assert given.tolist() == expected.tolist()
    expected = np.arange(128, 256)
    expected[1:32:2] += 1000
    assert out.tolist() == expected.tolist()
    with pytest.raises(BadAccess, match=r"no allocation"):
        run(body, np.arange(128, dtype=np.uint32), np.arange(16, dtype=np.uint32))


@pytest.mark.parametrize("space, base", [("shared", "%r7"), ("global", "%rd4")])
def test_widths_agree_with_bytes(space, base):
    """16 bytes a thread, written wide and read narrow, and the other way round."""
    values = np.random.default_rng(0).integers(0, 256, 512, dtype=np.uint8)
    copy = f"""
    ld.global.v4.u32 {{%r8, %r9, %r10, %r11}}, [%rd4];
    st.{space}.v4.u32 [{base}], {{%r8, %r9, %r10, %r11}};
    ld.{space}.u8 %r12, [{base}+5]; ld.{space}.s8 %r13, [{base}+6];
    ld.{space}.u16 %r14, [{base}+2]; ld.{space}.v2.u32 {{%r15, %r16}}, [{base}+8];
    st.{space}.u8 [{base}+15], %r12; ld.{space}.u64 %rd5, [{base}+8];
    add.s64 %rd6, %rd2, 0; mul.wide.u32 %rd7, %r1, 16; add.s64 %rd6, %rd6, %rd7;
    st.global.v4.u32 [%rd6], {{%r12, %r13, %r14, %r15}}; st.global.u64 [%rd6+512], %rd5;
    """
    kept = values.copy()
    out = np.zeros(256, np.uint32)
    run(copy, values, out)
    rows = kept.reshape(32, 16)
    got = out[:128].reshape(32, 4)
    assert got[:, 0].tolist() == rows[:, 5].tolist()
    assert got[:, 1].view(np.int32).tolist() == rows[:, 6].view(np.int8).tolist()
    assert got[:, 2].tolist() == np.ascontiguousarray(rows[:, 2:4]).view(np.uint16)[:, 0].tolist()
    assert got[:, 3].tolist() == np.ascontiguousarray(rows[:, 8:12]).view(np.uint32)[:, 0].tolist()
    last = rows[:, 8:].copy()
    last[:, 7] = rows[:, 5]
    assert out[128:].view(np.uint64)[::2].tolist() == last.view(np.uint64)[:, 0].tolist()


def test_of_threads_with_one_address_one_wins():
    out = run("mov.u32 %r2, %laneid; st.global.u32 [%rd2], %r2;")
    assert out[0] == 31 and not out[1:].any()


def test_an_allocation_that_starts_anywhere():
    """Elements are found by their address, wherever the allocation starts and ends."""
    whole = np.arange(64, dtype=np.uint8)
    start = whole.ctypes.data
    assert start % 16 == 0
    memory = GlobalMemory()
    memory.add(Allocation(start + 4, 30, is_written=False, name="part"))
    with pytest.raises(BadAccess, match=r"nobody wrote"):
        memory.load(np.array([start + 8]), 4, 2)
    memory.store(np.array([start + 8]), 4, np.array([[7, 9]], np.uint32))
    assert memory.load(np.array([start + 12]), 4, 1).tolist() == [[9]]
    assert whole[8:16].tolist() == [7, 0, 0, 0, 9, 0, 0, 0]
    for address, size in ((start, 4), (start + 32, 4), (start + 32, 16), (start + 34, 2)):
        with pytest.raises(BadAccess, match=r"in no allocation"):
            memory.load(np.array([address]), size if size < 16 else 4, 1 if size < 16 else 4)
    memory.store(np.array([start + 33]), 1, np.array([[1]], np.uint8))


def test_thirty_two_bytes_at_once():
    values = np.arange(64, dtype=np.uint64)
    memory = GlobalMemory()
    memory.add(Allocation(values.ctypes.data, values.nbytes, name="values"))
    at = values.ctypes.data + 32 * np.arange(2)
    at -= values.ctypes.data % 32
    if values.ctypes.data % 32:
        at += 32
    first = (at[0] - values.ctypes.data) // 8
    assert memory.load(at, 8, 4).tolist() == (first + np.arange(8)).reshape(2, 4).tolist()
    memory.store(at, 8, np.arange(100, 108, dtype=np.uint64).reshape(2, 4))
    assert values[first : first + 8].tolist() == list(range(100, 108))
    with pytest.raises(BadAccess, match=r"no multiple of 32"):
        memory.load(at + 16, 8, 4)
