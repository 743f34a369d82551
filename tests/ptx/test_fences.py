"""Which fence shows the initialisation of an mbarrier to a bulk load, and which does not."""

import pytest

from .bulk_programs import (
    BARRIER,
    HEAD,
    LOAD,
    aligned,
    counting,
    load_program,
    loaded,
    map_of,
    wait,
)
from .errors import BadAccess, Race, Unsupported
from .machine import EARLY, LATE, Mode
from .programs import execute

MODES = (EARLY, LATE, Mode(shuffled=True, seed=2))
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;\n"
TELL = "@%p0 fence.mbarrier_init.release.cluster;\n"
MEET = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"


def load(between: str, mode: Mode = EARLY, threads: int = 32, change=("", "")) -> None:
    """A bulk load of its own block, with ``between`` after the init of its mbarrier."""
    source = counting((16, 64))
    program = load_program(2048, (0, 0)).replace("bar.sync 0;", between, 1).replace(*change)
    got, _ = loaded(program, map_of(source, (64, 16)), source, 2048, mode, threads=threads)
    assert (got == source.view("u1").reshape(-1)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("between", [
    "bar.sync 0;",  # what Triton emits
    "bar.sync 0, 32;", "barrier.sync.aligned 3;", MEET,
    TELL, "fence.proxy.async;", "@%p0 fence.proxy.async.shared::cta;", TELL + "bar.sync 0;",
])  # fmt: skip
def test_a_fence_or_a_barrier_of_the_block_shows_the_init(between, mode):
    load(between, mode)


@pytest.mark.parametrize("between", [
    "", "bar.warp.sync -1;", "fence.acq_rel.cluster;", "fence.proxy.async.global;", "membar.cta;",
    "setp.eq.u32 %p1, %r1, 1;\n@%p1 fence.mbarrier_init.release.cluster;",  # another thread's
])  # fmt: skip
def test_an_init_that_nothing_shows(between):
    with pytest.raises(Race, match=r"^PTX line \d+: @ %p0 cp\.async\.bulk[^\n]*\n.*nothing has shown"
                       r" its initialisation at PTX line \d+ .* no fence\.mbarrier_init by thread 0"):  # fmt: skip
        load(between)


def test_what_comes_before_the_init_does_not_show_it():
    before = "bar.sync 0;\n" + TELL + "fence.proxy.async;\n"
    load("bar.sync 0;", change=(INIT, before + INIT))
    with pytest.raises(Race, match="nothing has shown its initialisation"):
        load("", change=(INIT, before + INIT))


def test_an_init_after_inval_is_shown_anew():
    again = "bar.sync 0;\n@%p0 mbarrier.inval.shared.b64 [%r2];\n" + INIT
    load(again + "bar.sync 0;")
    with pytest.raises(Race, match="nothing has shown its initialisation"):
        load(again)


ANOTHER = ("@%p0 mbarrier.arrive", "setp.eq.u32 %p0, %r1, 32;\n@%p0 mbarrier.arrive")


@pytest.mark.parametrize("between", [
    "bar.sync 0;", TELL + "bar.sync 0;", "fence.proxy.async;\nbar.sync 0;",
    "bar.sync 0;\nfence.proxy.async;",
    "@!%p0 bra WAITS;\nWAITS: bar.sync 0;",
])  # fmt: skip
def test_a_load_of_another_warp(between):
    load(between, threads=64, change=ANOTHER)


@pytest.mark.parametrize("between", [
    "", TELL, "fence.proxy.async;",
])  # fmt: skip
def test_a_load_of_another_warp_needs_a_barrier_as_well(between):
    with pytest.raises((Race, BadAccess), match="warp 0 wrote, with no barrier or wait between"):
        load(between, threads=64, change=ANOTHER)


OF_ANOTHER_BLOCK = (
    HEAD
    + f"""
add.u32 %r2, %r0, {BARRIER};
{{init}}
mov.u32 %r3, %cluster_ctarank;
setp.eq.u32 %p1, %r3, 0;
and.pred %p1, %p1, %p0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512;
mov.u16 %h0, 3;
@%p1 {LOAD.format(n=2)}.multicast::cluster [%r0], [%rd0, {{{{0, 0}}}}], [%r2], %h0;
{wait("%r2")}
{MEET}
"""
)
RELAXED = MEET.replace("arrive", "arrive.relaxed")


def load_everywhere(init: str, mode: Mode = EARLY, change=("", "")) -> None:
    """Block 0 of a cluster of two loads into both."""
    program = OF_ANOTHER_BLOCK.format(init=init).replace(*change)
    source = counting((8, 32))
    execute(program, map_of(source, (32, 8)), aligned(16), source, shared=BARRIER + 64, blocks=2,
            cluster=2, mode=mode)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("between", [
    TELL + MEET, TELL + RELAXED, "fence.proxy.async;\n" + MEET, TELL + "bar.sync 0;\n" + MEET,
    MEET + "fence.proxy.async;\n",
])  # fmt: skip
def test_another_blocks_barrier_that_was_fenced(between, mode):
    load_everywhere(INIT + between, mode)


@pytest.mark.parametrize("between", [
    MEET, "bar.sync 0;\n" + MEET, MEET + TELL,
])  # fmt: skip
def test_another_blocks_barrier_needs_a_fence(between):
    with pytest.raises(
        Race, match=r"(?s)multicast.*fence\.proxy\.async, which another block needs"
    ):
        load_everywhere(INIT + between)


@pytest.mark.parametrize("fence", ["", "fence.acq_rel.cluster;\n"])
def test_a_relaxed_arrival_shows_no_init(fence):
    with pytest.raises(Race, match="nothing has shown its initialisation"):
        load_everywhere(INIT + fence + RELAXED)


def test_the_fence_of_an_init_needs_sm_90():
    with pytest.raises(Unsupported, match=r"fence needs sm_90, this is sm_80"):
        execute("fence.mbarrier_init.release.cluster;", target="sm_80")
    with pytest.raises(Unsupported, match="is not known"):
        execute("fence.mbarrier_init.release.gpu;")
