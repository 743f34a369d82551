"""Barriers of a block and of a cluster, fences, mapa and setmaxnreg."""

import numpy as np
import pytest

from .errors import BadBarrier, Deadlock, MachineError, Race, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import WORD_OF_THREAD, execute

MODES = [EARLY, LATE, Mode(shuffled=True, seed=1), Mode(shuffled=True, seed=2)]
HEAD = (
    WORD_OF_THREAD
    + """mov.u32 %r5, memory;
shl.b32 %r6, %r1, 2;
add.u32 %r6, %r5, %r6;
shr.u32 %r7, %r1, 5;
"""
)
STORE = "\nst.global.u32 [%rd1], %r10;\n"
# the value of the thread `distance` further on in the block, through shared memory
SWAP = """
add.u32 %r11, %r1, {distance}; rem.u32 %r11, %r11, %r3; shl.b32 %r11, %r11, 2;
add.u32 %r11, %r5, %r11; ld.shared.u32 %r10, [%r11];
"""
PUT = "st.shared.u32 [%r6], %r4;"


def result(body: str, threads: int = 64, blocks: int = 1, **options) -> np.ndarray:
    found = np.zeros(threads * blocks, np.uint32)
    execute(HEAD + body + STORE, found, threads=threads, blocks=blocks, shared=4096, **options)
    return found.reshape(blocks, threads)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "form", ["bar.sync 0", "bar.sync 3, 64", "barrier.sync.aligned 0", "barrier.cta.sync 1",
             "mov.u32 %r12, 5; mov.u32 %r13, 64; bar.sync %r12, %r13"]
)  # fmt: skip
def test_a_barrier_orders_shared_memory(form, mode):
    found = result(f"{PUT} {form}; {SWAP.format(distance=40)}", blocks=3, mode=mode)
    each = np.arange(192).reshape(3, 64)
    assert (found == np.roll(each, -40, axis=1)).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_named_barriers_of_pairs_of_warps(mode):
    """Warps 0, 1 use barrier 1 and warps 2, 3 barrier 2, three times in a loop."""
    body = f"""
    shr.u32 %r12, %r7, 1; add.u32 %r12, %r12, 1; mov.u32 %r14, 0;
    LOOP:
    {PUT}
    bar.sync %r12, 64;
    xor.b32 %r11, %r1, 32; shl.b32 %r11, %r11, 2; add.u32 %r11, %r5, %r11;
    ld.shared.u32 %r10, [%r11];
    bar.sync %r12, 64;
    add.u32 %r14, %r14, 1; setp.lt.u32 %p1, %r14, 3; @%p1 bra LOOP;
    """
    assert (result(body, 128, mode=mode)[0] == np.arange(128) ^ 32).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_arrive_gives_what_sync_takes(mode):
    """Warp 0 writes and arrives without waiting; warp 1 waits and reads."""
    body = f"""
    mov.u32 %r10, 0; setp.ge.u32 %p1, %r7, 1; @%p1 bra READ;
    {PUT} bar.arrive 1, 64; bra END;
    READ: bar.sync 1, 64; {SWAP.format(distance=32)}
    END:
    """
    assert (result(body, mode=mode)[0] == [0] * 32 + list(range(32))).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_who_arrives_learns_nothing(mode):
    body = f"""
    mov.u32 %r10, 0; setp.ge.u32 %p1, %r7, 1; @%p1 bra READ;
    bar.arrive 1, 64; {SWAP.format(distance=32)} bra END;
    READ: {PUT} bar.sync 1, 64;
    END:
    """
    with pytest.raises((Race, MachineError), match=r"wrote|nobody"):
        result(body, mode=mode)


@pytest.mark.parametrize(
    "operation, expected", [("popc.u32 %r10, 0, %p1", 20), ("popc.u32 %r10, 2, 64, %p1", 20)]
)
def test_bar_red_counts(operation, expected):
    found = result(f"setp.lt.u32 %p1, %r1, 20; bar.red.{operation};", blocks=2)
    assert (found == expected).all()


def test_bar_red_of_predicates():
    for operation, limit, expected in (("and", 63, 0), ("and", 64, 1), ("or", 0, 0), ("or", 1, 1)):
        body = f"setp.lt.u32 %p1, %r1, {limit}; bar.red.{operation}.pred %p2, 0, %p1;"
        for mode in MODES:
            found = result(body + "selp.b32 %r10, 1, 0, %p2;", blocks=2, mode=mode)
            assert (found == expected).all()


@pytest.mark.parametrize(
    "body, said",
    [
        ("bar.sync 0, 33;", "a barrier of 33 threads: wanted a multiple of 32 up to the 64"),
        ("bar.sync 0, 96;", "a barrier of 96 threads"),
        ("bar.sync 0, 0;", "a barrier of 0 threads"),
        ("bar.sync 16;", "barrier 16: there are 16"),
        (
            "setp.eq.u32 %p1, %r7, 0; @%p1 bar.arrive 1, 64; @%p1 bar.sync 1, 64;",
            "warp 0 arrives twice",
        ),
        ("setp.eq.u32 %p1, %r7, 0; @%p1 bar.sync 1, 64; @!%p1 bar.sync 1, 32;", "is of "),
        ("and.b32 %r12, %r1, 1; bar.sync %r12;", "name different barriers"),
    ],
)
def test_bad_barriers(body, said):
    with pytest.raises(BadBarrier, match=said) as error:
        result(body)
    assert "PTX line" in str(error.value)


def test_more_threads_than_the_count():
    with pytest.raises(BadBarrier, match=r"arrive at barrier 1 of 32"):
        result("bar.arrive 1, 32;")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_barrier_that_some_never_reach(mode):
    body = "setp.eq.u32 %p1, %r7, 1; @%p1 ret; bar.sync 0;"
    with pytest.raises(Deadlock, match=r"warp 0 waits for barrier 0 of 64 threads at PTX line .*"
                       "bar.sync 0; warp 1 has ended"):  # fmt: skip
        result(body, mode=mode)
    body = "setp.eq.u32 %p1, %r7, 1; @%p1 bar.sync 1; @!%p1 bar.sync 2;"
    with pytest.raises(Deadlock, match=r"warp 0 waits for barrier 2.*warp 1 waits for barrier 1"):
        result(body, mode=mode)


def test_threads_that_ended_count_with_their_warp():
    found = result("setp.eq.u32 %p1, %r1, 5; @%p1 ret; bar.sync 0; mov.u32 %r10, 1;")
    assert found[0].tolist() == [int(n != 5) for n in range(64)]


# ---- clusters

REMOTE = """
mov.u32 %r12, %cluster_ctarank; xor.b32 %r13, %r12, 1;
mapa.shared::cluster.u32 %r14, %r6, %r13;
"""
CLUSTER = {"cluster": 2, "blocks": 4, "threads": 64}


def swapped() -> np.ndarray:
    return np.arange(256).reshape(2, 2, 64)[:, ::-1].reshape(4, 64)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("arrive, wait", [
    ("arrive", "wait"), ("arrive.release", "wait.acquire"), ("arrive.aligned", "wait.aligned"),
    ("arrive.release.aligned", "wait.acquire.aligned")])  # fmt: skip
def test_a_cluster_reads_the_other_block(arrive, wait, mode):
    meet = f"barrier.cluster.{arrive}; barrier.cluster.{wait};"
    body = f"{REMOTE} {PUT} {meet} ld.shared::cluster.u32 %r10, [%r14]; {meet}"
    assert (result(body, mode=mode, **CLUSTER) == swapped()).all()


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_cluster_without_its_barrier_races(mode):
    body = f"{REMOTE} {PUT} bar.sync 0; ld.shared::cluster.u32 %r10, [%r14];"
    with pytest.raises(MachineError, match=r"no barrier or wait between|nobody wrote"):
        result(body, mode=mode, **CLUSTER)


def test_a_blocks_own_barrier_does_not_order_the_other_block():
    """Block 1 writes to block 0, whose own barrier says nothing of it."""
    body = f"{REMOTE} {PUT} bar.sync 0; st.shared::cluster.u32 [%r14], %r4; bar.sync 0;"
    with pytest.raises(Race, match=r"of the shared memory of block . of the group"):
        result(body, **CLUSTER)


def test_a_relaxed_arrival_needs_a_fence():
    meet = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    body = REMOTE + PUT + "{}" + meet + "ld.shared::cluster.u32 %r10, [%r14];"
    with pytest.raises(Race):
        result(body.format(""), **CLUSTER)
    assert (result(body.format("fence.acq_rel.cluster;"), **CLUSTER) == swapped()).all()
    late = body.format("fence.acq_rel.cluster;").replace(PUT, "") .replace(
        "fence.acq_rel.cluster;", f"fence.acq_rel.cluster; {PUT}")  # fmt: skip
    with pytest.raises(Race):
        result(late, **CLUSTER)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ended_threads_have_arrived_at_the_clusters_barrier(mode):
    body = "setp.ne.u32 %p1, %r7, 0; @%p1 ret; barrier.cluster.arrive; barrier.cluster.wait; mov.u32 %r10, 1;"
    assert (result(body, mode=mode, **CLUSTER) == [1] * 32 + [0] * 32).all()


@pytest.mark.parametrize("body, said", [
    ("barrier.cluster.arrive; barrier.cluster.arrive;", "twice without a wait"),
    ("barrier.cluster.wait;", "without an arrival"),
])  # fmt: skip
def test_bad_barriers_of_a_cluster(body, said):
    with pytest.raises(BadBarrier, match=said):
        result(body, **CLUSTER)


def test_a_block_that_never_comes_to_the_clusters_barrier():
    body = """mov.u32 %r12, %cluster_ctarank; setp.eq.u32 %p1, %r12, 0;
    @%p1 bar.sync 1, 64; @!%p1 bar.arrive 1, 64; barrier.cluster.arrive; @!%p1 bar.sync 2; barrier.cluster.wait;
    @%p1 bar.sync 3;"""
    found = result(body, **CLUSTER)
    assert found.shape == (4, 64)
    body = """mov.u32 %r12, %cluster_ctarank; setp.eq.u32 %p1, %r12, 0; @%p1 bra A;
    barrier.cluster.arrive; barrier.cluster.wait; A: setp.eq.u32 %p1, %r7, 0; @%p1 bar.sync 2;"""
    with pytest.raises(Deadlock, match=r"barrier 2 of 64.*barrier of the cluster"):
        result(body, **CLUSTER)


def test_mapa_and_its_rank():
    body = REMOTE + "getctarank.shared::cluster.u32 %r10, %r14;"
    assert (result(body, **CLUSTER)[:, 0] == [1, 0, 1, 0]).all()
    assert (
        result("getctarank.shared::cluster.u32 %r10, %r6;", **CLUSTER)[:, 0] == [0, 1, 0, 1]
    ).all()
    with pytest.raises(MachineError, match=r"block 2 is not in a cluster of 2"):
        result("mapa.shared::cluster.u32 %r10, %r6, 2;", **CLUSTER)


def test_fences_and_dependents_that_change_nothing():
    for body in (
        "fence.proxy.async;", "fence.proxy.async.shared::cta;", "fence.proxy.async.global;",
        "fence.mbarrier_init.release.cluster;", "fence.acq_rel.gpu;", "fence.sc.sys;", "membar.gl;",
        "membar.cta;", "fence.acquire.cluster;", "griddepcontrol.wait;", "griddepcontrol.launch_dependents;",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd1 + 0], 0x80;",
    ):  # fmt: skip
        assert (result(body + "mov.u32 %r10, 3;") == 3).all()
    for body in ("fence.proxy.alias;", "fence.weak.gpu;", "membar.proxy.alias;", "bar.sync.gpu 0;",
                 "griddepcontrol.end;", "fence.proxy.tensormap::generic.acquire.gpu [%rd1 + 0], 64;",
                 "barrier.cluster.arrive.acquire;", "setmaxnreg.inc.u32 24;"):  # fmt: skip
        with pytest.raises(Unsupported, match=r"is not known"):
            result(body)


# ---- registers

GROUP = "shr.u32 %r8, %r1, 7; setp.eq.u32 %p1, %r8, 0;"


def registers(more: int, less: int, mode: Mode = EARLY) -> np.ndarray:
    body = f"""{GROUP} @%p1 bra LESS;
    setmaxnreg.inc.sync.aligned.u32 {more}; mov.u32 %r10, 2; bra END;
    LESS: setmaxnreg.dec.sync.aligned.u32 {less}; mov.u32 %r10, 1;
    END:"""
    return result(body, 384, mode=mode)[0]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_registers_go_from_one_warpgroup_to_two(mode):
    """384 threads start with 168 registers; 2 * 240 + 24 is 3 * 168."""
    expected = np.repeat([1, 2, 2], 128)
    assert (registers(240, 24, mode) == expected).all()
    assert (registers(232, 40, mode) == expected).all()


def test_registers_that_are_not_there():
    """The numbers of NVIDIA's forum: 224, 224 and 80 a thread wait for ever."""
    with pytest.raises(Deadlock, match=r"setmaxnreg.inc to 224 registers, which makes"):
        registers(224, 80)
    for wrong in (20, 264, 100):
        with pytest.raises(MachineError, match=r"multiple of 8 from 24 to 256"):
            registers(240, wrong)
    with pytest.raises(MachineError, match=r"setmaxnreg.dec to 200 registers; a thread holds 168"):
        registers(240, 200)


def test_a_warpgroup_changes_registers_whole():
    body = "setp.eq.u32 %p1, %r7, 2; @%p1 bra END; setmaxnreg.dec.sync.aligned.u32 40; END:"
    with pytest.raises(BadBarrier, match=r"warps 0 to 3 of a warpgroup did not all execute"):
        result(body, 128)
