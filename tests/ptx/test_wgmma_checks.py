"""What the machine says of ``wgmma`` without its fences and waits."""

import numpy as np
import pytest

from . import wgmma_programs as programs
from .errors import BadAccess, Deadlock, Race, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import execute
from .wgmma_programs import COMMIT, FENCE, FILLED, MEMORY, STORE, WAIT, names

BOTH = pytest.mark.parametrize("mode", [EARLY, LATE], ids=["early", "late"])
ALL = pytest.mark.parametrize("mode", [EARLY, LATE, Mode(True, True, 5)], ids=str)
A, B = (programs.descriptor(at, 0, 128, 256) for at in (MEMORY, MEMORY + 2048))
HEAD = f"mov.b64 %q6, {A};\nmov.b64 %q7, {B};\n"
MULTIPLY = f"""wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16
{names("d", 8)}, %q6, %q7, 1, 1, 1, 0, 0;
"""
FROM_REGISTERS = f"""wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
{names("d", 4)}, {names("a", 4)}, %q7, 1, 1, 1, 0;
"""
ONE = np.uint32(0x3C003C00)  # two halves


def run(text: str, mode: Mode = EARLY, filled: str = FILLED) -> np.ndarray:
    """D (8, 128) as floats: A and B are ones in shared memory and in registers, D starts at 0."""
    image = np.full(4096 // 4, ONE, np.uint32).view(np.uint8)
    zeros = np.zeros((8, 128), np.uint32)
    return programs.run(image, zeros[:4] + ONE, zeros, HEAD + text, filled, mode).view(np.float32)


@ALL
def test_products_of_one_group_add(mode):
    assert (run(FENCE + MULTIPLY * 3 + COMMIT + WAIT, mode) == 48).all()


@ALL
def test_wait_for_all_but_the_newest_group(mode):
    """The second group's product has other accumulators: the first's may be read."""
    other = MULTIPLY.replace(names("d", 8), names("e", 8))
    text = f".reg .b32 %e<8>;\n{FENCE}{MULTIPLY}{COMMIT}{other}{COMMIT}"
    text += "wgmma.wait_group.sync.aligned 1;\n" + STORE + "\n" + WAIT
    assert (run(text, mode) == 16).all()


def test_result_without_a_wait_differs_between_the_modes():
    text = FENCE + MULTIPLY + COMMIT + STORE
    assert (run(text, EARLY) == 16).all()
    assert (run(text, LATE) == 0).all()


def test_result_of_a_group_that_was_not_waited_for_differs():
    text = FENCE + (MULTIPLY + COMMIT) * 2 + "wgmma.wait_group.sync.aligned 1;\n" + STORE
    assert (run(text, EARLY) == 32).all()
    assert (run(text, LATE) == 16).all()


@BOTH
def test_accumulator_written_before_the_wait(mode):
    with pytest.raises(Race, match=r"register %d3 of thread 0 .*nobody waited for"):
        run(FENCE + MULTIPLY + COMMIT + "mov.b32 %d3, 5;\n" + WAIT, mode)


@BOTH
@pytest.mark.parametrize("fence", ["", FENCE])
def test_operand_register_written_before_the_wait(mode, fence):
    with pytest.raises(Race, match="register %a2 of thread 0"):
        run(FENCE + FROM_REGISTERS + COMMIT + "mov.b32 %a2, 5;\n" + fence + WAIT, mode)


@BOTH
def test_registers_may_be_written_after_the_wait(mode):
    text = FENCE + FROM_REGISTERS + COMMIT + WAIT + "mov.b32 %a2, 0;\nmov.b32 %a3, 0;\n"
    again = FENCE + FROM_REGISTERS + COMMIT + WAIT
    assert (run(text + again, mode)[:4] == 24).all()


@BOTH
def test_product_without_a_fence(mode):
    with pytest.raises(Race, match=r"no wgmma\.fence"):
        run(MULTIPLY + COMMIT + WAIT, mode)


@BOTH
@pytest.mark.parametrize("name, product", [("d2", MULTIPLY), ("a1", FROM_REGISTERS)])
def test_register_written_after_the_fence(mode, name, product):
    with pytest.raises(Race, match=f"%{name} of thread 0 .*after the last wgmma.fence"):
        run(FENCE + f"add.s32 %{name}, %{name}, 7;\n" + product + COMMIT + WAIT, mode)


@BOTH
def test_copies_after_the_fence(mode):
    """As LLVM puts them: an accumulator gets its first value from another's."""
    text = FENCE + "mov.b32 %d2, %d1;\nmov.b32 %d3, 0f3F800000;\n" + MULTIPLY + COMMIT + WAIT
    found = run(text, mode)
    assert (found[3] == 17).all() and (np.delete(found, 3, 0) == 16).all()


OVERWRITE = "st.shared.b32 [%s1], %s0;\n"


@BOTH
def test_shared_operand_written_before_the_wait(mode):
    with pytest.raises(Race, match="wgmma of warp 0 read"):
        run(FENCE + MULTIPLY + COMMIT + OVERWRITE + WAIT, mode)


@BOTH
def test_shared_operand_written_after_the_wait(mode):
    """All warps must have waited: the barrier tells."""
    text = FENCE + MULTIPLY + COMMIT + WAIT
    assert (run(text + "bar.sync 0;\n" + OVERWRITE, mode) == 16).all()


@pytest.mark.parametrize("filled", ["bar.sync 0;\n", "bar.sync 0;\n" + FILLED.splitlines()[0]])
def test_written_without_a_fence_of_the_proxy(filled):
    if "fence" in filled:  # after the barrier, each warp fences what it knows of all others
        assert (run(FENCE + MULTIPLY + COMMIT + WAIT, filled=filled) == 16).all()
        return
    with pytest.raises(Race, match=r"without fence\.proxy\.async"):
        run(FENCE + MULTIPLY + COMMIT + WAIT, filled=filled)


def test_written_without_a_barrier():
    with pytest.raises(Race, match="no barrier or wait"):
        run(FENCE + MULTIPLY + COMMIT + WAIT, filled="fence.proxy.async.shared::cta;")


@BOTH
def test_reads_what_nobody_wrote(mode):
    beyond = programs.descriptor(MEMORY + 4096, 0, 128, 256)
    text = f"mov.b64 %q7, {beyond};\n" + FENCE + MULTIPLY + COMMIT + WAIT
    with pytest.raises(BadAccess, match="outside the block's"):
        run(text, mode)


PLAIN = """
.reg .b32 %r<8>, %d<8>;
.reg .b64 %q<8>;
.reg .pred %p<2>;
ld.param.u64 %q0, [p0];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
shl.b32 %r2, %r0, 4;
mov.u32 %r3, memory;
add.s32 %r2, %r2, %r3;
shr.u32 %r4, %r0, 7;
add.s32 %r4, %r4, 1;
cvt.rn.f16.u32 %h0, %r4;
mov.b32 %r5, {%h0, %h0};
st.shared.v4.b32 [%r2], {%r5, %r5, %r5, %r5};
fence.proxy.async.shared::cta;
bar.sync 0;
"""


@ALL
def test_two_warpgroups_of_two_blocks(mode):
    """Warpgroup g has ones times g + 1 in its own 2048 bytes, A and B alike: 16 (g + 1)^2."""
    registers = "\n".join(f"mov.b32 %d{n}, 0;" for n in range(4))
    stores = "\n".join(f"st.global.b32 [%q1+{4 * n}], %d{n};" for n in range(4))
    body = f""".reg .b16 %h<2>;{PLAIN}{registers}
shr.u32 %r6, %r0, 7;
shl.b32 %r6, %r6, 7;
cvt.u64.u32 %q2, %r6;
add.s64 %q2, %q2, {A};
{FENCE}
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {names("d", 4)}, %q2, %q2, 1, 1, 1, 0, 0;
{COMMIT}{WAIT}
shl.b32 %r7, %r1, 8;
add.s32 %r7, %r7, %r0;
mul.wide.u32 %q1, %r7, 16;
add.s64 %q1, %q1, %q0;
{stores}"""
    d = np.zeros((2, 256, 4), np.float32)
    execute(body, d, threads=256, blocks=2, shared=4096, mode=mode)
    assert (d[:, :128] == 16).all() and (d[:, 128:] == 64).all()


@BOTH
def test_shared_memory_that_nobody_wrote(mode):
    body = f""".reg .b32 %d<4>;\n.reg .b64 %q<8>;\nmov.b64 %q6, {A};\n{FENCE}
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {names("d", 4)}, %q6, %q6, 0, 1, 1, 0, 0;
{COMMIT}{WAIT}"""
    with pytest.raises(BadAccess, match="nobody wrote"):
        execute(body, threads=128, shared=4096, mode=mode)


def test_warp_that_stays_away():
    body = f""".reg .b32 %r<2>;\n.reg .pred %p<2>;\nmov.u32 %r0, %tid.x;
setp.lt.u32 %p0, %r0, 32;\n@%p0 bra DONE;\n{FENCE}\nDONE:"""
    with pytest.raises(Deadlock, match="the rest of its warpgroup"):
        execute(body, threads=128)


def test_descriptors_that_differ_within_a_warpgroup():
    body = f""".reg .b32 %r<2>, %d<4>;\n.reg .b64 %q<8>;\nmov.u32 %r0, %tid.x;
cvt.u64.u32 %q6, %r0;\n{FENCE}
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {names("d", 4)}, %q6, %q6, 0, 1, 1, 0, 0;"""
    with pytest.raises(Unsupported, match="several descriptors"):
        execute(body, threads=128, shared=4096)
