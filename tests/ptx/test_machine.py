"""The order of threads: they part and meet, end, and come to a limit; and what is refused."""

import numpy as np
import pytest

from .errors import Deadlock, MachineError, Unsupported
from .machine import EARLY, LATE, Machine, Mode
from .parser import parse
from .programs import WORD_OF_THREAD, execute

MODES = [EARLY, LATE, *(Mode(shuffled=True, seed=n) for n in range(3))]
HEAD = (
    WORD_OF_THREAD
    + """mov.u32 %r10, 0;
"""
)
STORE = "\nst.global.u32 [%rd1], %r10;\n"


def result(body: str, threads: int = 64, blocks: int = 2, mode: Mode = EARLY, **options):
    found = np.full(threads * blocks, 77, np.uint32)
    execute(HEAD + body + STORE, found, threads=threads, blocks=blocks, mode=mode, **options)
    return found.reshape(blocks, threads)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nested_branches_meet_again(mode):
    body = """
    and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bra EVEN;
    and.b32 %r5, %r1, 2; setp.eq.u32 %p2, %r5, 0; @%p2 bra LOW;
    mov.u32 %r10, 3; bra MEET;
    LOW: mov.u32 %r10, 1;
    MEET: add.u32 %r10, %r10, 10; bra END;
    EVEN: mov.u32 %r10, 100;
    END: shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1; add.u32 %r10, %r10, %r11;
    """
    lane = np.arange(64)
    odd = np.where(lane & 2, 13, 11)  # of the odd lane of each pair
    assert (result(body, mode=mode) == 100 + odd[lane | 1]).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_loops_of_other_lengths(mode):
    """Thread t goes round t + 1 times; then all of the warp meet."""
    body = """
    mov.u32 %r5, 0;
    LOOP: add.u32 %r10, %r10, 3; add.u32 %r5, %r5, 1;
    setp.le.u32 %p1, %r5, %r1; @%p1 bra LOOP;
    shfl.sync.idx.b32 %r11, %r10, 31, 31, -1; sub.u32 %r10, %r11, %r10;
    """
    last = np.repeat([31, 63], 32)
    assert (result(body, mode=mode) == 3 * (last - np.arange(64))).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_block_out_of_line_jumps_back_before_a_barrier(mode):
    body = """
    setp.ge.u32 %p1, %r1, 40; @%p1 bra FAR;
    NEAR: mov.u32 %r11, memory; mov.u32 %r12, 9; st.shared.u32 [%r11], %r12;
    bar.sync 0;
    add.u32 %r10, %r10, 1;
    st.global.u32 [%rd1], %r10;
    ret;
    FAR: mov.u32 %r10, 5; bra NEAR;
    """
    assert (result(body, mode=mode, shared=64) == np.where(np.arange(64) >= 40, 6, 1)).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_some_threads_end_early(mode):
    body = "and.b32 %r5, %r1, 3; setp.eq.u32 %p1, %r5, 0; @%p1 ret; mov.u32 %r10, 1; bar.sync 0;"
    assert (result(body, mode=mode) == np.where(np.arange(64) % 4, 1, 77)).all()
    assert (result("exit;", mode=mode) == 77).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_each_warp_takes_its_own_way(mode):
    body = """
    shr.u32 %r5, %r1, 5; mov.u32 %r6, 0;
    LOOP: setp.ge.u32 %p1, %r6, %r5; @%p1 bra OUT;
    add.u32 %r6, %r6, 1; add.u32 %r10, %r10, %r6; bra.uni LOOP;
    OUT: bar.sync 0;
    """
    warp = np.arange(128) // 32
    assert (result(body, 128, mode=mode) == warp * (warp + 1) // 2).all()


def test_blocks_of_several_groups_and_a_rest():
    """5 blocks of 512 threads: two groups of two, and one."""
    found = result("add.u32 %r10, %r2, 1;", 512, 5)
    assert (found == np.arange(1, 6)[:, None]).all()


def test_a_register_that_nobody_wrote_is_no_number():
    """Nor what a block before it left there."""
    found = result("and.b32 %r5, %r2, 1; setp.eq.u32 %p1, %r5, 0; @%p1 mov.u32 %r6, 5; mov.u32 %r10, %r6;",
                   512, 6)  # fmt: skip
    assert (found[::2] == 5).all() and (found[1::2] == 2**32 - 1).all()


def test_instructions_are_counted_by_warps():
    found = np.zeros(64, np.uint32)
    body = "shr.u32 %r5, %r1, 5; setp.eq.u32 %p1, %r5, 1; @%p1 bra END; mov.u32 %r10, 1; END:"
    counts = execute(HEAD + body + STORE, found, threads=64)
    assert counts.instructions.tolist() == 8 * [2] + 3 * [2] + [1] + 2 * [2]


def test_an_endless_loop_comes_to_the_limit(monkeypatch):
    monkeypatch.setattr(Machine, "limit", 1000)
    for mode in MODES:
        with pytest.raises(
            Deadlock, match=r"PTX line .*\n.*1000 instructions of warps were executed"
        ):
            result("LOOP: add.u32 %r10, %r10, 1; bra LOOP;", mode=mode)


def test_a_deadlock_says_what_each_warp_does():
    body = """
    shr.u32 %r5, %r1, 5; setp.eq.u32 %p1, %r5, 1; @%p1 bra OTHER;
    setp.eq.u32 %p2, %r1, 3; @%p2 bra OTHER; bar.sync 0; OTHER: bar.sync 1, 64; bar.sync 1, 96;
    """
    with pytest.raises(Deadlock) as error:
        result(body, 96, 1)
    said = str(error.value)
    assert "warp 0 waits for the rest of its warp at PTX line 21: bar.sync 0" in said
    assert "warp 1 waits for barrier 1 of 64" in said
    assert "warp 2 waits for barrier 0 of 96 threads at PTX line 21: bar.sync 0" in said


def test_a_thread_that_runs_off_the_end():
    text = ".version 8.7\n.target sm_80\n.visible .entry f()\n{\n.reg .b32 %r<2>;\nmov.u32 %r1, 1;\n}\n"
    from .launch import run
    from .machine import Launch

    with pytest.raises(MachineError, match=r"past the last instruction"):
        run(Launch(parse(text), (1, 1, 1), 32, b""))


LOC = """
.file 1 "/somewhere/kernel.py"
"""


def test_a_fault_names_the_line_of_the_source():
    text = f"""
.version 8.7
.target sm_80
.address_size 64
.visible .entry f(.param .u64 p0)
{{
.reg .b32 %r<4>;
.reg .b64 %rd<4>;
.loc 1 41 7
mov.u64 %rd1, 8;
.loc 1 42 3
ld.global.u32 %r1, [%rd1];
ret;
}}
{LOC}
"""
    from .launch import run
    from .machine import Launch

    with pytest.raises(MachineError, match=r"^PTX line 12 \(kernel.py:42\): ld.global.u32"):
        run(Launch(parse(text), (1, 1, 1), 32, bytes(8)))


@pytest.mark.parametrize(
    "body, said",
    [
        (
            "frobnicate.b32 %r1, %r2;",
            r"PTX line \d+: frobnicate.*\n.*opcode frobnicate.b32 is not known",
        ),
        ("add.rz.u32 %r1, %r2, %r3;", "opcode add.rz.u32 is not known"),
        ("mov.u32 %r1, %clock;", "register '%clock' is not known"),
        ("bra NOWHERE;", "no label 'NOWHERE'"),
    ],
)
def test_what_is_not_known_is_refused(body, said):
    with pytest.raises(Unsupported, match=said):
        result(body)


def test_launches_that_the_target_refuses():
    with pytest.raises(Unsupported, match=r"target 'sm_70' is not known; known are sm_80"):
        result("", target="sm_70")
    with pytest.raises(
        Unsupported, match=r"asks for 200000 bytes of shared memory; sm_80 has 166912"
    ):
        result("", target="sm_80", shared=200_000)
    result("", 32, 1, target="sm_90a", shared=200_000)
    with pytest.raises(Unsupported, match=r"a block of 48 threads"):
        result("", 48)
    with pytest.raises(Unsupported, match=r"a block of 2048 threads"):
        result("", 2048)
    with pytest.raises(Unsupported, match=r"no whole clusters of 2"):
        result("", blocks=3, cluster=2)
