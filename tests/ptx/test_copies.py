"""cp.async: what moves, when it is visible, and what is refused. PTX ISA 9.7.9.25.3."""

import numpy as np
import pytest

from .errors import BadAccess, Race, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import execute

SHUFFLED = Mode(shuffled=True, seed=1)
MODES = pytest.mark.parametrize("mode", [EARLY, LATE, SHUFFLED], ids=["early", "late", "shuffled"])
THREADS = 64

# thread t: %s its 16 bytes of shared memory, %g and %o its 16 bytes of p0 and p1
HEAD = """
.reg .b32 %r<8>, %t, %n, %s, %w; .reg .b64 %g, %o; .reg .pred %p, %q;
mov.u32 %t, %tid.x;
mov.u32 %w, memory; shl.b32 %s, %t, 4; add.u32 %s, %s, %w;
ld.param.u64 %g, [p0]; mad.wide.u32 %g, %t, 16, %g;
ld.param.u64 %o, [p1]; mad.wide.u32 %o, %t, 16, %o;
"""
CLEAR = "mov.u32 %r0, -1; st.shared.v4.b32 [%s], {%r0, %r0, %r0, %r0};\n"
COPY = "cp.async.cg.shared.global [%s], [%g], 16;\n"
COMMIT, WAIT = "cp.async.commit_group;\n", "cp.async.wait_group 0;\n"
OUT = """ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%s];
st.global.v4.b32 [%o], {%r4, %r5, %r6, %r7};
"""


def program(body, mode=EARLY, given=None, **options):
    """What p1 is after ``body``, (threads, 16) bytes, and p0, which it copies."""
    given = np.arange(THREADS * 16, dtype=np.uint8).reshape(THREADS, 16) if given is None else given
    found = np.zeros((THREADS, 16), np.uint8)
    counts = execute(HEAD + body, given, found, threads=THREADS, shared=2048, target="sm_80",
                     mode=mode, **options)  # fmt: skip
    return found, given, counts


@MODES
@pytest.mark.parametrize("opcode", [
    "cp.async.cg.shared.global [%s], [%g], 16",
    "cp.async.ca.shared.global [%s], [%g], 16",
    "cp.async.cg.shared::cta.global.L2::128B [ %s + 0 ], [ %g + 0 ], 0x10, 16",
    "cp.async.cg.shared.global.L2::cache_hint [%s], [%g], 16, %o",
    "cp.async.ca.shared.global.L2::cache_hint.L2::256B [%s], [%g], 16, %n, %o",
])  # fmt: skip
def test_copy_moves_bytes(opcode, mode):
    found, given, _ = program(f"mov.u32 %n, 16; {opcode};\n" + COMMIT + WAIT + OUT, mode)
    np.testing.assert_array_equal(found, given)


@MODES
@pytest.mark.parametrize("size", [4, 8])
def test_copy_of_fewer_bytes_leaves_the_others(size, mode):
    copy = f"cp.async.ca.shared.global [%s], [%g], {size};\n"
    found, given, _ = program(CLEAR + copy + "cp.async.wait_all;\n" + OUT, mode)
    np.testing.assert_array_equal(found[:, :size], given[:, :size])
    assert (found[:, size:] == 255).all()


@MODES
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy_fills_with_zeros_past_the_source_size(size, mode):
    """Thread t has a source of t % (size + 1) bytes."""
    copy = f"rem.u32 %n, %t, {size + 1}; cp.async.ca.shared.global [%s], [%g], {size}, %n;\n"
    found, given, _ = program(CLEAR + copy + "cp.async.wait_all;\n" + OUT, mode)
    for t in range(THREADS):
        of = t % (size + 1)
        wanted = [*given[t, :of], *[0] * (size - of), *[255] * (16 - size)]
        assert found[t].tolist() == wanted


@MODES
def test_copy_takes_its_operands_when_it_is_issued(mode):
    body = """mov.u32 %n, 8; cp.async.cg.shared.global [%s], [%g], 16, %n;
    mov.u32 %r0, %s; mov.u32 %n, 0; mov.u32 %s, 0; mov.b64 %g, 0;
    cp.async.wait_all;
    """
    found, given, _ = program(body + OUT.replace("[%s]", "[%r0]"), mode)
    np.testing.assert_array_equal(found[:, :8], given[:, :8])
    assert not found[:, 8:].any()


@MODES
def test_copy_of_nothing_does_not_read_its_source(mode):
    far = "mov.u32 %n, 0; mov.b64 %g, 8;\n"
    body = far + "cp.async.cg.shared.global [%s], [%g], 16, %n;\ncp.async.wait_all;\n" + OUT
    assert not program(body, mode)[0].any()


@MODES
def test_copy_ignores_a_source_by_predicate(mode):
    body = """setp.lt.u32 %p, %t, 10;
    cp.async.cg.shared.global [%s], [%g], 16, %p;
    cp.async.wait_all;
    """
    found, given, _ = program(body + OUT, mode)
    assert not found[:10].any()
    np.testing.assert_array_equal(found[10:], given[10:])


@MODES
def test_copy_under_a_guard_is_of_some_threads(mode):
    body = CLEAR + "and.b32 %n, %t, 1; setp.eq.u32 %p, %n, 0;\n@%p " + COPY + COMMIT + WAIT + OUT
    found, given, _ = program(body, mode)
    np.testing.assert_array_equal(found[::2], given[::2])
    assert (found[1::2] == 255).all()


def test_late_copies_read_their_source_at_the_wait():
    """A source that is overwritten before the wait: early and late differ."""
    body = COPY + COMMIT + "mov.u32 %r0, 0; st.global.b32 [%g], %r0;\n" + WAIT + OUT
    early, late = (program(body, mode)[0] for mode in (EARLY, LATE))
    assert early[1:, :4].any() and not late[:, :4].any()
    np.testing.assert_array_equal(early[:, 4:], late[:, 4:])


SECOND = """add.u32 %n, %s, 1024;
st.shared.v4.b32 [%n], {%r0, %r0, %r0, %r0};
cp.async.cg.shared.global [%n], [%g], 16;
cp.async.commit_group;
"""
TWO = CLEAR + COPY + COMMIT + SECOND


@MODES
def test_wait_group_leaves_the_newest(mode):
    """With one group left the first has come; the second has not, and reading it is a race."""
    found, given, _ = program(TWO + "cp.async.wait_group 1;\n" + OUT, mode)
    np.testing.assert_array_equal(found, given)
    with pytest.raises(Race, match=r"(?s)ld.shared.*warp . reads byte .* cp.async of warp . wrote"):
        program(TWO + "cp.async.wait_group 1;\n" + OUT.replace("[%s]", "[%n]"), mode)
    found, given, _ = program(TWO + WAIT + OUT.replace("[%s]", "[%n]"), mode)
    np.testing.assert_array_equal(found, given)


@MODES
@pytest.mark.parametrize("body, message", [
    (COPY + COMMIT + OUT, "ld.shared"),  # no wait
    (COPY + WAIT + COMMIT + OUT, "ld.shared"),  # not committed at the wait
    (CLEAR + COPY + COMMIT + CLEAR + WAIT, "writes byte"),  # overwritten before the wait
    (COPY + COMMIT + COPY + COMMIT + WAIT, "cp.async of warp . writes byte"),  # in no order
])  # fmt: skip
def test_copy_needs_its_wait(body, message, mode):
    with pytest.raises((Race, BadAccess), match=message):
        program(body, mode)


OTHER = "xor.b32 %n, %s, 512;\n"  # the same lane of the other warp


@MODES
def test_other_warps_know_a_copy_after_a_barrier(mode):
    read = OTHER + OUT.replace("[%s]", "[%n]")
    found, given, _ = program(COPY + COMMIT + WAIT + "bar.sync 0;\n" + read, mode)
    np.testing.assert_array_equal(found, np.roll(given, 32, axis=0))
    with pytest.raises((Race, BadAccess)):
        program(COPY + COMMIT + WAIT + read, mode)
    with pytest.raises((Race, BadAccess)):  # the barrier is before the wait
        program(COPY + COMMIT + "bar.sync 0;\n" + WAIT + read, mode)


@MODES
def test_copy_over_what_others_read_needs_a_barrier(mode):
    read = OTHER + "bar.sync 0;\nld.shared.b32 %r4, [%n];\n"
    program(CLEAR + read + "bar.sync 0;\n" + COPY + "cp.async.wait_all;\n" + OUT, mode)
    with pytest.raises(Race, match=r"cp.async of warp . (writes byte .*warp . read|wrote)"):
        program(CLEAR + read + COPY, mode)


@MODES
def test_groups_are_of_each_thread(mode):
    """Lanes below 16 commit twice: one group left is another one for them."""
    more = """setp.lt.u32 %p, %t, 16; @%p cp.async.commit_group;
    cp.async.wait_group 1;
    @%p ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%s];
    @%p st.global.v4.b32 [%o], {%r4, %r5, %r6, %r7};
    """
    found, given, _ = program(CLEAR + COPY + COMMIT + more, mode)
    np.testing.assert_array_equal(found[:16], given[:16])


def test_late_copies_that_nobody_waits_for_come_before_the_end():
    """Their source is checked all the same, and the error names the copy."""
    with pytest.raises(BadAccess, match=r"PTX line \d+: cp.async.cg"):
        program("add.u64 %g, %g, 1024;\n" + COPY, LATE)


@MODES
@pytest.mark.parametrize("body, message", [
    ("mov.u32 %n, 17; cp.async.cg.shared.global [%s], [%g], 16, %n;", "has a source of 17"),
    ("cp.async.cg.shared.global [%s+4], [%g], 16;", "no multiple of 16"),
    ("cp.async.cg.shared.global [%s], [%g+8], 16; cp.async.wait_all;", "no multiple of 16"),
    ("mov.u32 %n, 8; cp.async.cg.shared.global [%s], [%g+8], 16, %n; cp.async.wait_all;",
     "no multiple of 16"),
    ("cp.async.cg.shared.global [%s+2048], [%g], 16;", "outside the block's 2048 bytes"),
    ("cp.async.cg.shared.global [%s], [%g+1024], 16; cp.async.wait_all;", "in no allocation|nobody|p0"),
])  # fmt: skip
def test_copy_checks_its_addresses(body, message, mode):
    with pytest.raises(BadAccess, match=message) as caught:
        program(body, mode)
    assert "cp.async.cg" in str(caught.value)


def test_copy_of_memory_that_nobody_wrote_is_an_error():
    with pytest.raises(BadAccess, match="nobody wrote"):
        program(COPY + "cp.async.wait_all;", unwritten=(0,))


@pytest.mark.parametrize("text", [
    "cp.async.cg.shared.global [%s], [%g], 8",
    "cp.async.ca.shared.global [%s], [%g], 12",
    "cp.async.cg.global.shared [%g], [%s], 16",
    "cp.async.cg.shared.global.L3::64B [%s], [%g], 16",
    "cp.async.cb.shared.global [%s], [%g], 16",
    "cp.async.cg.shared.global [%s], [%g], %n",
    "cp.async.wait_group %n",
    "cp.async.wait_some",
    "cp.async.shared.global [%s], [%g], 16",
    "cp.async.mbarrier.arrive.noinc.shared.b64 [%s]",
])  # fmt: skip
def test_copy_refuses_other_forms(text):
    with pytest.raises(Unsupported, match=r"PTX line \d+: cp.async"):
        program(text + ";\n")


def test_copy_is_counted():
    """64 threads of 16 bytes in a row: 32 sectors, 8 passes of 128 bytes; half of them read none."""
    data = np.zeros(THREADS * 16 + 32, np.uint8)
    data = data[-data.ctypes.data % 32 :]  # aligned to a sector
    counts = program(COPY + "cp.async.wait_all;\n", given=data, counted=True)[2]
    assert (counts.loaded, counts.sectors, counts.least) == (1024, 32, 32)
    assert counts.wavefronts == counts.free == 8
    half = """setp.lt.u32 %p, %t, 32; selp.b32 %n, 16, 0, %p;
    cp.async.cg.shared.global [%s], [%g], 16, %n; cp.async.wait_all;
    """
    counts = program(half, given=data, counted=True)[2]
    assert (counts.loaded, counts.sectors, counts.wavefronts) == (512, 16, 8)


@MODES
def test_blocks_of_a_group_have_their_own_copies(mode):
    """Two groups of blocks one after another: nothing is left of the first."""
    blocks = 40
    given = np.arange(blocks * 128, dtype=np.uint32).reshape(blocks, 32, 4)
    found = np.zeros_like(given)
    body = """.reg .b32 %r<8>, %t, %b, %s; .reg .b64 %g, %o;
    mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %s, memory; mad.lo.u32 %s, %t, 16, %s;
    mad.lo.u32 %t, %b, 32, %t;
    ld.param.u64 %g, [p0]; mad.wide.u32 %g, %t, 16, %g;
    ld.param.u64 %o, [p1]; mad.wide.u32 %o, %t, 16, %o;
    """
    execute(body + COPY + COMMIT + WAIT + OUT, given, found, blocks=blocks, shared=512, mode=mode)
    np.testing.assert_array_equal(found, given)
