"""mbarrier: phases, states, parities, bytes, remote arrivals, what a wait teaches, and misuse."""

import numpy as np
import pytest

from .errors import BadAccess, BadBarrier, Deadlock, Race, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import execute

MODES = (EARLY, LATE, Mode(shuffled=True, seed=3))
HEAD = """
.reg .b16 %h<8>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<8>;
mov.b32 %r0, memory;
mov.u32 %r1, %tid.x;
setp.eq.u32 %p0, %r1, 0;
setp.lt.u32 %p1, %r1, 32;
ld.param.u64 %rd0, [p0];
shl.b32 %r2, %r1, 2;
add.u32 %r3, %r0, %r2;
add.u32 %r3, %r3, 16;
mul.wide.u32 %rd1, %r1, 4;
add.u64 %rd0, %rd0, %rd1;
"""  # thread t: memory + 16 + 4 t is %r3, p0 + 4 t is %rd0; the barriers are at memory and memory + 8


def run(body: str, threads: int = 64, mode: Mode = EARLY, **kwargs) -> np.ndarray:
    out = np.full(512, 99, np.uint32)
    execute(HEAD + body, out, threads=threads, shared=4096, mode=mode, **kwargs)
    return out


def init(count: int) -> str:
    return f"@%p0 mbarrier.init.shared::cta.b64 [%r0], {count};\nbar.sync 0;\n"


def wait(parity: int, name: str = "L", address: str = "%r0") -> str:
    return f"""
{name}: mbarrier.try_wait.parity.shared.b64 %p2, [{address}], {parity};
@!%p2 bra {name};
"""


HAND_OVER = """
@%p1 bra CONSUME;
st.shared.u32 [%r3+-128], %r1;
{arrive}
bra.uni END;
CONSUME:
{wait}
ld.shared.u32 %r4, [%r3];
st.global.u32 [%rd0], %r4;
END:
"""  # warp 1 writes its numbers, warp 0 reads them


@pytest.mark.parametrize("mode", MODES)
def test_a_wait_sees_what_was_written_before_the_arrivals(mode):
    arrive = "mbarrier.arrive.shared.b64 _, [%r0];"
    out = run(init(32) + HAND_OVER.format(arrive=arrive, wait=wait(0)), mode=mode)
    assert (out[:32] == np.arange(32, 64)).all()


@pytest.mark.parametrize("arrive", [
    "mbarrier.arrive.release.cta.shared::cta.b64 %rd5, [%r0];",
    "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r0];",
    "mbarrier.arrive.shared::cta.b64 %rd5, [%r0], 1;",
    "mov.u32 %r8, 1;\nmbarrier.arrive.shared::cta.b64 _, [%r0], %r8;",
])  # fmt: skip
@pytest.mark.parametrize("sem", ["", ".acquire.cta", ".acquire.cluster"])
def test_forms_of_arrivals_and_waits(arrive, sem):
    waits = wait(0).replace(".parity", f".parity{sem}")
    out = run(init(32) + HAND_OVER.format(arrive=arrive, wait=waits))
    assert (out[:32] == np.arange(32, 64)).all()


def test_a_relaxed_arrival_orders_nothing():
    arrive = "mbarrier.arrive.relaxed.cta.shared.b64 _, [%r0];"
    with pytest.raises(Race, match="no barrier or wait between"):
        run(init(32) + HAND_OVER.format(arrive=arrive, wait=wait(0)))


def test_a_relaxed_wait_orders_nothing():
    arrive = "mbarrier.arrive.shared.b64 _, [%r0];"
    waits = wait(0).replace(".parity", ".parity.relaxed.cluster")
    with pytest.raises(Race, match="no barrier or wait between"):
        run(init(32) + HAND_OVER.format(arrive=arrive, wait=waits))


def test_an_arrival_before_the_write_is_a_race():
    body = HAND_OVER.replace("st.shared.u32 [%r3+-128], %r1;\n{arrive}",
                             "{arrive}\nst.shared.u32 [%r3+-128], %r1;")  # fmt: skip
    arrive = "mbarrier.arrive.shared.b64 _, [%r0];"
    with pytest.raises((Race, BadAccess)):
        run(init(32) + body.format(arrive=arrive, wait=wait(0)))


@pytest.mark.parametrize("mode", MODES)
def test_parities_of_three_phases(mode):
    """Each thread of two warps arrives three times and sees phases 0, 1 and 2 end."""
    body = init(64)
    for phase in range(3):
        body += f"st.shared.u32 [%r3], {phase};\n" if phase == 0 else ""
        body += "mbarrier.arrive.shared.b64 _, [%r0];" + wait(phase % 2, f"L{phase}")
    body += "mov.u32 %r5, 7;\nst.global.u32 [%rd0], %r5;"
    assert (run(body, mode=mode)[:64] == 7).all()


def test_the_phase_before_the_first_has_parity_one():
    body = init(1) + wait(1) + "mov.u32 %r5, 7;\nst.global.u32 [%rd0], %r5;"
    assert (run(body)[:64] == 7).all()


@pytest.mark.parametrize("operation", ["test_wait", "try_wait"])
@pytest.mark.parametrize("mode", MODES)
def test_a_state_names_the_phase_of_the_arrival(operation, mode):
    body = (
        init(64)
        + f"""
    mbarrier.arrive.shared.b64 %rd5, [%r0];
    L: mbarrier.{operation}.shared.b64 %p2, [%r0], %rd5;
    @!%p2 bra L;
    mbarrier.arrive.shared.b64 %rd6, [%r0];
    M: mbarrier.{operation}.acquire.cta.shared::cta.b64 %p2, [%r0], %rd6;
    @!%p2 bra M;
    sub.s64 %rd7, %rd6, %rd5;
    cvt.u32.u64 %r5, %rd7;
    st.global.u32 [%rd0], %r5;
    """
    )
    assert (run(body, mode=mode)[:64] == 1).all()


def test_a_state_two_phases_old_is_refused():
    body = (
        init(32)
        + """
    @!%p1 bra END;
    mbarrier.arrive.shared.b64 %rd5, [%r0];
    mbarrier.arrive.shared.b64 %rd6, [%r0];
    mbarrier.test_wait.shared.b64 %p2, [%r0], %rd5;
    END:
    """
    )
    with pytest.raises(BadBarrier, match="a state of phase 0"):
        run(body)


def test_arrivals_of_one_instruction_may_end_many_phases():
    """64 arrivals, two a phase: the states are the numbers of the phases."""
    body = (
        init(2)
        + """
    mbarrier.arrive.shared.b64 %rd5, [%r0];
    cvt.u32.u64 %r5, %rd5;
    st.global.u32 [%rd0], %r5;
    """
    )
    assert (run(body)[:64] == np.arange(64) // 2).all()


@pytest.mark.parametrize("mode", MODES)
def test_expected_bytes_are_waited_for(mode):
    """Thread 0 expects 24 bytes and arrives; 32 and 63 complete 8 and 16."""
    body = (
        init(1)
        + """
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 8;
    bar.sync 0;
    setp.eq.u32 %p3, %r1, 32;
    setp.eq.u32 %p4, %r1, 63;
    @%p0 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 16;
    bar.sync 0;
    @%p3 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 8;
    @%p4 mbarrier.complete_tx.shared::cta.b64 [%r0], 16;
    """
        + wait(0)
        + "st.global.u32 [%rd0], %r1;"
    )
    assert (run(body, mode=mode)[:64] == np.arange(64)).all()


def test_bytes_may_come_before_they_are_expected():
    body = (
        init(1)
        + """
    @%p0 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 8;
    bar.sync 0;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 8;
    """
        + wait(0)
        + "st.global.u32 [%rd0], %r1;"
    )
    assert (run(body)[:64] == np.arange(64)).all()


def test_inval_gives_the_bytes_back():
    body = (
        init(1)
        + """
    @%p0 mbarrier.inval.shared::cta.b64 [%r0];
    bar.sync 0;
    @%p0 st.shared.v2.u32 [%r0], {5, 5};
    bar.sync 0;
    ld.shared.u32 %r5, [%r0];
    st.global.u32 [%rd0], %r5;
    bar.sync 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r0], 3;
    """
    )
    assert (run(body)[:64] == 5).all()


REMOTE = (
    init(1)
    + """
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r5, %cluster_ctarank;
xor.b32 %r6, %r5, 1;
{
.reg .b32 remote;
mapa.shared::cluster.u32 remote, %r0, %r6;
@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];
}
"""
)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_a_cluster_arrive_at_each_other(mode):
    body = (
        REMOTE
        + wait(0)
        + """
    shl.b32 %r7, %r5, 8;
    cvt.u64.u32 %rd3, %r7;
    add.u64 %rd0, %rd0, %rd3;
    st.global.u32 [%rd0], %r1;
    """
    )
    out = run(body, blocks=2, cluster=2, mode=mode)
    assert (out[:128] == np.tile(np.arange(64), 2)).all()


def test_a_remote_arrival_without_a_cluster_barrier_after_the_init_is_caught():
    body = REMOTE.replace("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n", "")
    with pytest.raises((Race, BadBarrier)):
        run(body + wait(0), blocks=2, cluster=2)


def test_a_remote_arrival_at_a_block_that_has_ended_is_caught():
    body = REMOTE.replace(
        "@%p0 mbarrier.arrive",
        """
    setp.eq.u32 %p4, %r5, 1;
    @%p4 bra END;
    and.pred %p0, %p0, %p1;
    @%p0 mbarrier.arrive""",
    )
    wasted = "mov.u32 %r9, 0;\nW: add.u32 %r9, %r9, 1;\nsetp.lt.u32 %p5, %r9, 50;\n@%p5 bra W;\n"
    body = body.replace("and.pred %p0, %p0, %p1;", wasted)
    with pytest.raises(BadBarrier, match="block 1 of the group has ended"):
        run("bra.uni START;\nEND: ret;\nSTART:\n" + body, blocks=2, cluster=2)


def test_a_barrier_is_not_made_invalid_while_threads_wait():
    body = init(1) + "@!%p1 bra WAIT;\nmov.u32 %r9, 0;\nW: add.u32 %r9, %r9, 1;\n"
    body += (
        "setp.lt.u32 %p5, %r9, 50;\n@%p5 bra W;\n@%p0 mbarrier.inval.shared.b64 [%r0];\nbra END;\n"
    )
    with pytest.raises(BadBarrier, match="is made invalid while threads wait for it"):
        run("bra.uni START;\nWAIT:" + wait(0) + "END: ret;\nSTART:\n" + body)


def test_a_local_form_refuses_the_address_of_another_block():
    body = REMOTE.replace(".release.cluster.shared::cluster", ".shared::cta")
    with pytest.raises(BadBarrier, match=r"needs \.shared::cluster"):
        run(body, blocks=2, cluster=2)


@pytest.mark.parametrize("body, error, said", [
    ("mbarrier.arrive.shared.b64 _, [%r0];", BadBarrier, "no mbarrier was initialised"),
    (init(1) + init(1), BadBarrier, "initialised again without inval"),
    (init(0), BadBarrier, "cannot expect 0 arrivals"),
    (init(1) + "@%p0 mbarrier.arrive.shared.b64 _, [%r0], 2;", BadBarrier, "2 arrivals"),
    (init(3) + "@%p0 mbarrier.arrive.shared.b64 _, [%r0], 0;", BadBarrier, "0 arrivals"),
    (init(1) + "@%p0 ld.shared.u32 %r5, [%r0+4];", BadBarrier, "reads the bytes of an mbarrier"),
    (init(1) + "@%p0 st.shared.u32 [%r0+4], %r5;", BadBarrier, "writes to the bytes of an mbarrier"),
    (init(1) + "@%p0 mbarrier.expect_tx.shared.b64 [%r0], 1048576;", BadBarrier, "the limit"),
    (init(1) + "@%p0 mbarrier.complete_tx.shared.b64 [%r0], 8;\nbar.sync 0;\n"
     "@%p0 mbarrier.arrive.shared.b64 _, [%r0];", BadBarrier, "8 bytes more than were expected"),
    (init(1) + "@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r0], 8;\n"
     "@%p0 mbarrier.arrive.shared.b64 _, [%r0];", BadBarrier, "expects 0 more of 1"),
    (init(1) + wait(2), BadBarrier, "parity 2"),
    (init(1) + "mbarrier.arrive.shared.b64 _, [%r0+4];", BadAccess, "no multiple of 8"),
    ("@%p0 mbarrier.init.shared.b64 [%r0], 32;\n@!%p1 bra END;\n"
     "mbarrier.arrive.shared.b64 _, [%r0];\nEND:\n", None, ""),
    ("@%p0 mbarrier.init.shared.b64 [%r0], 64;\nmbarrier.arrive.shared.b64 _, [%r0];", Race,
     "no barrier or wait between"),
    (init(1) + "@!%p1 bra END;" + wait(0) + "END:", Deadlock,
     r"warp 0 waits for the mbarrier at 0x400 of block 0 .*phase 0: 1 arrivals of 1"),
])  # fmt: skip
def test_misuse(body, error, said):
    if error is None:
        run(body)
        return
    with pytest.raises(error, match=said):
        run(body)


@pytest.mark.parametrize("form", [
    "mbarrier.arrive.noComplete.shared.b64 %rd5, [%r0], 1;",
    "mbarrier.arrive_drop.shared.b64 %rd5, [%r0];",
    "mbarrier.pending_count.b64 %r5, %rd5;",
    "mbarrier.arrive.b64 %rd5, [%rd0];",
    "mbarrier.arrive.shared::cluster.b64 %rd5, [%r0];",
    "mbarrier.arrive.expect_tx.shared.b64 _, [%r0];",
    "mbarrier.arrive.acquire.cta.shared.b64 _, [%r0];",
    "mbarrier.try_wait.parity.release.cta.shared.b64 %p2, [%r0], 0;",
    "mbarrier.try_wait.parity.shared::cluster.b64 %p2, [%r0], 0;",
    "mbarrier.test_wait.parity.shared.b64 %p2, [%r0], 0, 100;",
    "mbarrier.init.shared.b32 [%r0], 1;",
])  # fmt: skip
def test_other_forms_are_refused(form):
    with pytest.raises(Unsupported, match="PTX line"):
        run(form)
