"""Races in shared memory: what is one, what is none, and that a message says where."""

import numpy as np
import pytest

from .clocks import COPY
from .errors import Race
from .machine import EARLY, LATE, Mode
from .programs import execute
from .watch import Watch

MODES = [EARLY, LATE, *(Mode(shuffled=True, seed=n) for n in range(3))]
HEAD = """
.reg .pred %p<8>;
.reg .b16 %h<4>;
.reg .b32 %r<24>;
.reg .b64 %rd<8>;
mov.u32 %r1, %tid.x;
shr.u32 %r2, %r1, 5;
and.b32 %r3, %r1, 31;
setp.eq.u32 %p1, %r2, 0;
setp.eq.u32 %p2, %r3, 0;
mov.u32 %r5, memory;
shl.b32 %r6, %r3, 2; add.u32 %r6, %r5, %r6;
shl.b32 %r7, %r1, 2; add.u32 %r7, %r5, %r7;
"""


def run(body: str, mode: Mode = EARLY, threads: int = 64, blocks: int = 2) -> None:
    execute(HEAD + body, threads=threads, blocks=blocks, shared=4096, mode=mode)


# (first access by warp 0, second by warp 1)
PAIRS = {
    "write then read": ("st.shared.u32 [%r6], %r1;", "ld.shared.u32 %r10, [%r6];"),
    "read then write": ("ld.shared.u32 %r10, [%r6];", "st.shared.u32 [%r6], %r1;"),
    "write then write": ("st.shared.u32 [%r6], %r1;", "st.shared.u32 [%r6], %r1;"),
    "wide write, narrow read": (
        "st.shared.v4.u32 [%r5], {%r1, %r1, %r1, %r1};", "ld.shared.u8 %r10, [%r5+5];"),
    "narrow read, wide write": (
        "ld.shared.u8 %r10, [%r5+5];", "st.shared.v4.u32 [%r5], {%r1, %r1, %r1, %r1};"),
}  # fmt: skip
FILL = "mov.u32 %r9, 0; st.shared.u32 [%r7], %r9; st.shared.u32 [%r7+256], %r9; bar.sync 0;"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_two_warps_race_but_for_a_barrier(pair, mode):
    first, second = PAIRS[pair]
    body = "{} @%p1 bra ONE; {} bra END; ONE: {} {} END:"
    for between in ("", "bar.warp.sync -1;", "membar.cta;"):
        with pytest.raises(Race, match=r"warp . .* byte .* of the shared memory .*, which warp"):
            run(body.format(FILL, between + second, first, between), mode)
    for barrier in ("bar.sync 0;", "bar.sync 1, 64;"):
        run(body.format(FILL, barrier + second, first, barrier), mode)
    run(body.format(FILL, "bar.sync 1, 64;" + second, first, "bar.arrive 1, 64;"), mode)


def test_a_race_names_its_line():
    with pytest.raises(Race, match=r"PTX line 21: ld.shared.u32 %r10"):
        run(f"{FILL} @%p1 st.shared.u32 [%r6], %r1;\nld.shared.u32 %r10, [%r6];")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equal_values_of_two_warps_are_no_race(mode):
    run(f"{FILL} mov.u32 %r9, 7; st.shared.u32 [%r6], %r9;", mode)
    run(f"{FILL} st.shared.v2.u32 [%r5], {{%r9, %r9}};", mode)
    with pytest.raises(Race):
        run(f"{FILL} st.shared.u32 [%r6], %r1;", mode)
    with pytest.raises(Race):  # equal but in one byte
        run(f"{FILL} shl.b32 %r9, %r2, 24; add.u32 %r9, %r9, 5; st.shared.u32 [%r6], %r9;", mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bytes_next_to_each_other_are_no_race(mode):
    body = """
    shl.b32 %r10, %r3, 1; add.u32 %r10, %r10, %r2; add.u32 %r10, %r5, %r10;
    cvt.u16.u32 %h1, %r1; st.shared.u8 [%r10], %h1; ld.shared.u8 %h2, [%r10];
    """
    run(body, mode)
    with pytest.raises(Race):
        run(FILL + body + "st.shared.u8 [%r10], %h1; ld.shared.u16 %h2, [%r6];", mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_warp_is_in_order_with_itself(mode):
    run(
        f"{FILL} st.shared.u32 [%r7], %r1; ld.shared.u32 %r10, [%r7]; st.shared.u32 [%r7], %r3;",
        mode,
    )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_loop_with_one_barrier_too_few(mode):
    body = """{fill}
    mov.u32 %r12, 0;
    LOOP:
    st.shared.u32 [%r7], %r12;
    bar.sync 0;
    xor.b32 %r13, %r1, 32; shl.b32 %r13, %r13, 2; add.u32 %r13, %r5, %r13;
    ld.shared.u32 %r10, [%r13];
    {second}
    add.u32 %r12, %r12, 1;
    setp.lt.u32 %p3, %r12, 4;
    @%p3 bra LOOP;
    """
    run(body.format(fill=FILL, second="bar.sync 0;"), mode)
    with pytest.raises(Race, match=r"with no barrier or wait between"):
        run(body.format(fill=FILL, second=""), mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_barrier_of_others_orders_nothing(mode):
    """Warps 2 and 3 meet; warp 1 reads what warp 0 wrote."""
    body = """
    setp.lt.u32 %p3, %r2, 2; setp.eq.u32 %p4, %r2, 1;
    @%p1 st.shared.u32 [%r6], %r1;
    @!%p3 bar.sync 1, 64;
    @%p4 ld.shared.u32 %r10, [%r6];
    """
    with pytest.raises(Race, match=r"with no barrier or wait between"):
        run(FILL + body, mode, threads=128)


def test_knowledge_goes_through_a_third_warp():
    """0 tells 1 by barrier 1, and 1 tells 2 by barrier 2: 2 may read what 0 wrote."""
    body = """
    setp.eq.u32 %p3, %r2, 1; setp.eq.u32 %p4, %r2, 2;
    @%p1 st.shared.u32 [%r6], %r1;
    @%p1 bar.arrive 1, 64;
    @%p3 bar.sync 1, 64;
    @%p3 bar.arrive 2, 64;
    @%p4 bar.sync 2, 64;
    @%p4 ld.shared.u32 %r10, [%r6];
    """
    for mode in MODES:
        run(FILL + body, mode, threads=96)


# ---- the watch by itself: two blocks of two warps


def watch() -> Watch:
    return Watch(4, 2 * 128, 2)


def bytes_of(*at: int) -> np.ndarray:
    return np.array(at)


def test_more_notes_than_the_journal_holds():
    """Reads that were noted long ago still count, and what a barrier ordered does not."""
    w = watch()
    for n in range(200):
        w.read_at(bytes_of(4 * (n % 8)), 4, bytes_of(0))
    with pytest.raises(Race, match=r"warp 1 writes byte 12 .* which warp 0 read"):
        w.write_at(bytes_of(12), 4, bytes_of(1))
    w.meet(bytes_of(0, 1), slice(0, 128))
    w.write_at(bytes_of(12), 4, bytes_of(1))


def test_the_barrier_of_one_block_leaves_the_other_as_it_was():
    w = watch()
    w.write_at(bytes_of(0, 128), 4, bytes_of(0, 2))
    w.meet(bytes_of(0, 1), slice(0, 128))
    w.read_at(bytes_of(0), 4, bytes_of(1))
    with pytest.raises(Race, match=r"block 1 of the group"):
        w.read_at(bytes_of(128), 4, bytes_of(3))
    w.meet_blocks(True)
    w.read_at(bytes_of(128), 4, bytes_of(3))


def test_a_write_after_a_write_hides_no_read():
    """Warp 0 reads and tells 1, which writes; 1 tells nobody: 2 of the same block must not write."""
    w = Watch(3, 128, 1)
    w.read_at(bytes_of(0), 4, bytes_of(0))
    w.acquire(1, w.release(0))
    w.write_at(bytes_of(0), 4, bytes_of(1))
    with pytest.raises(Race, match=r"warp 2 writes byte 0 .* which warp 1 wrote"):
        w.write_at(bytes_of(0), 4, bytes_of(2))


def test_copies_are_known_to_who_waits_and_who_meets_it():
    w = watch()
    w.copy(bytes_of(16), 16, bytes_of(0), bytes_of(1))
    for warp in (0, 1):
        with pytest.raises(Race, match=r"which cp.async of warp 0 wrote"):
            w.read_at(bytes_of(20), 4, bytes_of(warp))
    w.meet(bytes_of(0, 1), slice(0, 128))
    with pytest.raises(Race):  # a barrier waits for no copy
        w.read_at(bytes_of(20), 4, bytes_of(1))
    w.learn_copies(bytes_of(0), bytes_of(1))
    w.read_at(bytes_of(20), 4, bytes_of(0))
    with pytest.raises(Race):
        w.read_at(bytes_of(20), 4, bytes_of(1))
    w.meet(bytes_of(0, 1), slice(0, 128))
    w.read_at(bytes_of(20), 4, bytes_of(1))
    assert (w.flags[16:20] == 0).all()  # known to all: as any byte
    with pytest.raises(Race, match=r"cp.async of warp 0 writes .* which warp 1 read"):
        w.copy(bytes_of(16), 16, bytes_of(0), bytes_of(2))


def test_a_newer_copy_keeps_its_flag():
    """The first copy is known to all; the second, to the same bytes, is not waited for."""
    w = watch()
    w.copy(bytes_of(16), 16, bytes_of(0), bytes_of(1))
    w.learn_copies(bytes_of(0), bytes_of(1))
    w.copy(bytes_of(16), 16, bytes_of(0), bytes_of(2))
    w.meet(bytes_of(0, 1), slice(0, 128))
    with pytest.raises(Race):
        w.read_at(bytes_of(16), 4, bytes_of(1))


def test_work_reads_behind_a_fence():
    w = watch()
    at = np.arange(16)
    agent = w.agent(1, 2)
    w.write_at(bytes_of(0), 16, bytes_of(0))
    w.meet(bytes_of(0, 1), slice(0, 128))
    for read in (
        lambda: w.read_later(at, agent, 1, w.knowledge(1)),
        lambda: w.read_units_later(bytes_of(0), agent, 1, w.knowledge(1)),
    ):
        with pytest.raises(Race, match=r"without fence.proxy.async between"):
            read()
    w.fence(bytes_of(1))
    w.read_units_later(bytes_of(0), agent, 1, w.knowledge(1))
    w.meet(bytes_of(0, 1), slice(0, 128))
    with pytest.raises(Race, match=r"warp 0 writes byte 4 .* which wgmma of warp 1 read"):
        w.write_at(bytes_of(4), 4, bytes_of(0))
    w.learn(1, agent, 1)
    w.meet(bytes_of(0, 1), slice(0, 128))
    w.write_at(bytes_of(4), 4, bytes_of(0))


def test_the_fence_of_a_warp_says_nothing_to_others():
    w = watch()
    w.write_at(bytes_of(0), 16, bytes_of(0))
    w.meet(bytes_of(0, 1), slice(0, 128))
    w.fence(bytes_of(0))  # after they met: warp 1 does not know
    with pytest.raises(Race, match=r"without fence.proxy.async between"):
        w.read_units_later(bytes_of(0), w.agent(1, 2), 1, w.knowledge(1))


def test_a_write_after_the_fence_is_not_fenced():
    w = watch()
    w.fence(bytes_of(0))
    w.write_at(bytes_of(0), 16, bytes_of(0))
    with pytest.raises(Race, match=r"without fence.proxy.async between"):
        w.read_units_later(bytes_of(0), w.agent(0, 2), 1, w.knowledge(0))


def test_copies_of_one_block_are_not_known_where_another_meets():
    w = watch()
    w.copy(bytes_of(128), 16, bytes_of(2), bytes_of(1))
    w.learn_copies(bytes_of(2), bytes_of(1))
    w.meet(bytes_of(0, 1), slice(0, 128))
    with pytest.raises(Race, match=r"which cp.async of warp 2 wrote"):
        w.read_at(bytes_of(128), 4, bytes_of(3))


def test_work_that_writes_waits_for_readers():
    w = watch()
    at, agent = slice(0, 64), w.barrier_agent(120)
    w.read_at(bytes_of(8), 8, bytes_of(1))
    with pytest.raises(Race, match=r"a bulk load writes byte 8 .* which warp 1 read"):
        w.write_later(at, agent, 1, w.knowledge(0))
    w.acquire(0, w.release(1))
    w.write_later(at, agent, 1, w.knowledge(0))
    with pytest.raises(Race, match=r"warp 1 reads byte 0 .* which a bulk load wrote"):
        w.read_at(bytes_of(0), 8, bytes_of(1))
    w.learn(1, agent, 1)
    w.read_at(bytes_of(0), 8, bytes_of(1))
    assert w.agent(1, COPY) == 5


def test_more_copies_than_are_kept():
    """Copies that nobody waits for stay unknown, however many come after them."""
    w = Watch(2, 8192, 1)
    for n in range(400):
        w.copy(bytes_of(16 * n), 16, bytes_of(0), bytes_of(n + 1))
    w.learn_copies(bytes_of(0), bytes_of(10))
    w.meet_blocks(True)
    w.read_at(bytes_of(16 * 9), 16, bytes_of(1))
    for n in (10, 60, 399):
        with pytest.raises(Race, match=r"which cp.async of warp 0 wrote"):
            w.read_at(bytes_of(16 * n), 16, bytes_of(1))
