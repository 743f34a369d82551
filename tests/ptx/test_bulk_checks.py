"""What is wrong with bulk copies: races, places, barriers, and forms that are refused."""

import numpy as np
import pytest

from .bulk_programs import (
    BARRIER,
    EARLY,
    HEAD,
    aligned,
    counting,
    load_program,
    loaded,
    map_of,
    store_program,
    to_global,
    wait,
)  # fmt: skip
from .errors import BadAccess, BadBarrier, Race, Unsupported
from .machine import LATE, Mode
from .programs import execute


def run_store(**changes) -> None:
    target, given = aligned((16, 64), np.uint16), aligned(2048)
    mode = changes.pop("mode", EARLY)
    program = store_program(2048, (0, 0), **changes)
    execute(program, map_of(target, (64, 16)), given, target, shared=BARRIER, mode=mode)


def test_a_store_without_a_fence_is_a_race():
    with pytest.raises(Race, match=r"without fence\.proxy\.async between"):
        run_store(fence="")


def test_a_store_of_what_was_written_after_the_fence_is_a_race():
    with pytest.raises(Race, match=r"without fence\.proxy\.async between"):
        run_store(fence="fence.proxy.async.shared::cta;\nst.shared.u32 [%r0], %r1;")


@pytest.mark.parametrize("end", ["", "cp.async.bulk.wait_group.read 1;"])
def test_a_source_overwritten_before_its_wait_is_a_race(end):
    with pytest.raises(Race, match=r"writes byte .* which bulk store of warp 0 read"):
        run_store(end=end + "bar.sync 0;\nst.shared.u32 [%r0], %r1;")


def test_a_source_may_be_overwritten_after_its_wait():
    run_store(end="cp.async.bulk.wait_group.read 0;\nbar.sync 0;\n@%p0 st.shared.u32 [%r0], %r1;")


def test_blocks_that_end_before_a_store_has_read_are_caught():
    with pytest.raises(BadBarrier, match="has ended: its shared memory is gone"):
        run_store(end="", mode=Mode(late=True))


@pytest.mark.parametrize("change, error, said", [
    ((f"add.u32 %r2, %r0, {BARRIER};", "add.u32 %r2, %r0, 512;"), BadBarrier,
     "a bulk copy of the bytes of an mbarrier"),
    (("WAIT:", "bra.uni NEXT;\nWAIT:"), Race, "which a bulk load wrote, with no barrier"),
    (("], 2048;", "], 2032;"), BadBarrier, "16 bytes more than were expected"),
    (("[%r0], [%rd0", "[%r0+64], [%rd0"), BadAccess, "no multiple of 128"),
    (("[%r0], [%rd0", "[%r0+16256], [%rd0"), BadAccess, "outside the block's"),
    (("[%rd0, {0, 0}]", "[%rd0, {0, 0, 0}]"), Unsupported, "3 coordinates of 2 dimensions"),
    (("[%rd0, {0, 0}]", "[%rd0+32, {0, 0}]"), BadAccess, "no multiple of 64"),
    (("[%rd0, {0, 0}]", "[%rd1, {0, 0}]"), BadAccess, "never encoded"),
    (("bar.sync 0;\n", "bar.sync 0;\n@%p0 mbarrier.inval.shared.b64 [%r2];\n"), BadBarrier,
     "no mbarrier was initialised"),
    (("@%p0 cp", "mov.b32 %r9, %r2;\n@%p0 st.shared.u32 [%r9+32], %r2;\nbar.warp.sync -1;\n"
      "setp.eq.u32 %p0, %r1, 1;\n@%p0 cp"), None, ""),
])  # fmt: skip
def test_misuse_of_loads(change, error, said):
    source = counting((16, 64))
    program = load_program(2048, (0, 0)).replace(*change) + "NEXT:\n"
    if "NEXT;" in change[1]:
        program += to_global(2048).replace("COP", "KOP")
    if error is None:
        loaded(program, map_of(source, (64, 16)), source, 2048)
        return
    with pytest.raises(error, match=said):
        loaded(program, map_of(source, (64, 16)), source, 2048)


def test_a_box_beyond_its_allocation():
    source = counting((16, 64))
    packed = map_of(source, (64, 16), sizes=(64, 17))
    with pytest.raises(BadAccess, match="p2 has 2048 bytes, these are 128 to 2176"):
        loaded(load_program(2048, (0, 1)), packed, source, 2048)


def test_bytes_that_nobody_wrote():
    source = counting((16, 64))
    with pytest.raises(BadAccess, match="bytes of p2 of 2048 bytes, which nobody wrote"):
        loaded(load_program(2048, (0, 0)), map_of(source, (64, 16)), source, 2048, unwritten=(2,))


def test_a_late_load_is_an_error_where_its_block_has_ended():
    program = load_program(2048, (0, 0))
    program = program[: program.index("WAIT:")]
    with pytest.raises(BadBarrier, match=r"PTX line .*\n.*has ended"):
        loaded(program, map_of(counting((16, 64)), (64, 16)), counting((1,)), 2048,
               Mode(late=True))  # fmt: skip


def test_an_inner_row_narrower_than_the_swizzle_is_unsupported():
    source = counting((16, 64))
    with pytest.raises(Unsupported, match="rows of 64 bytes in a swizzle of 128"):
        loaded(load_program(1024, (0, 0)), map_of(source, (32, 16), 128), source, 1024)


@pytest.mark.parametrize("form", [
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd0], [%r0], 16;",
    "cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
    " [%r0], [%rd0, {0, 0, 0}], [%r2], {%h0};",
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r0], [%r2], 16, [%r3];",
    "cp.async.bulk.prefetch.L2.global [%rd0], 16;",
    "cp.async.bulk.wait_group %r1;",
    "cp.async.bulk.tensor.6d.global.shared::cta.bulk_group [%rd0, {0, 0, 0, 0, 0, 0}], [%r0];",
    "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.multicast::cluster"
    " [%r0], [%rd0], 16, [%r2], %h0;",
])  # fmt: skip
def test_other_forms_are_refused(form):
    with pytest.raises(Unsupported, match="PTX line"):
        execute(HEAD + form, aligned(16), aligned(16), shared=1024)


AGAIN = (
    HEAD
    + f"""
add.u32 %r2, %r0, {BARRIER};
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
@%p0 mbarrier.init.shared::cta.b64 [%r2+8], 32;
bar.sync 0;
setp.lt.u32 %p1, %r1, 32;
@%p1 bra PRODUCE;
{wait("%r2")}
ld.shared.u32 %r3, [%r0];
mbarrier.arrive.shared::cta.b64 _, [%r2+8];
{wait("%r2", 1, "MORE")}
bra.uni END;
PRODUCE:
@!%p0 bra END;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%rd0], 1024, [%r2];
FREE: mbarrier.try_wait.parity.shared.b64 %p7, [%r2+8], 0;
@!%p7 bra FREE;
mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%rd0], 1024, [%r2];
END:
"""
)  # a ring of one stage: warp 0 loads it twice, warp 1 reads it and says that it is free


@pytest.mark.parametrize("mode", [EARLY, LATE, Mode(shuffled=True)])
def test_a_stage_may_be_loaded_again_when_its_readers_said_so(mode):
    execute(AGAIN, counting((512,)), aligned(16), threads=64, shared=BARRIER + 64, mode=mode)


@pytest.mark.parametrize("mode", [EARLY, LATE, Mode(shuffled=True)])
@pytest.mark.parametrize("change", [
    ("FREE: mbarrier.try_wait.parity.shared.b64 %p7, [%r2+8], 0;",
     "FREE: mbarrier.try_wait.parity.shared.b64 %p7, [%r2], 0;"),  # its own load, not the readers
    ("ld.shared.u32 %r3, [%r0];\nmbarrier.arrive.shared::cta.b64 _, [%r2+8];",
     "mbarrier.arrive.shared::cta.b64 _, [%r2+8];\nld.shared.u32 %r3, [%r0];"),
])  # fmt: skip
def test_a_stage_loaded_again_too_early_is_a_race(change, mode):
    assert change[0] in AGAIN
    with pytest.raises(Race, match="with no barrier or wait between"):
        execute(AGAIN.replace(*change), counting((512,)), aligned(16), threads=64,
                shared=BARRIER + 64, mode=mode)  # fmt: skip


def test_a_load_by_a_barrier_whose_init_another_warp_may_not_have_made():
    program = load_program(2048, (0, 0)).replace("bar.sync 0;", "setp.eq.u32 %p0, %r1, 32;", 1)
    with pytest.raises((Race, BadBarrier)):
        loaded(program, map_of(counting((16, 64)), (64, 16)), counting((1,)), 2048, threads=64)


LOAD_BY_ANOTHER = (
    HEAD
    + f"""
setp.eq.u32 %p1, %r1, 32;
add.u32 %r2, %r0, {BARRIER};
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
{{meet}}
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%rd0], 1024, [%r2];
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
bar.sync 0;
{wait("%r2")}
"""
)


def test_a_load_that_another_warp_starts_knows_of_the_init():
    given = counting((512,)), aligned(16)
    execute(LOAD_BY_ANOTHER.format(meet="bar.sync 0;"), *given, threads=64, shared=BARRIER + 64)
    with pytest.raises(Race, match=r"(?s)cp\.async\.bulk.*warp 1 uses byte .* which warp 0 wrote"):
        execute(LOAD_BY_ANOTHER.format(meet=""), *given, threads=64, shared=BARRIER + 64)


def test_a_store_of_bytes_that_nobody_wrote():
    program = HEAD + "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r0], 16;"
    with pytest.raises(BadAccess, match="which nobody wrote"):
        execute(program, aligned(16), aligned(16), shared=64)


def test_a_store_of_another_blocks_memory():
    program = (
        HEAD
        + """
    mapa.shared::cluster.u32 %r2, %r0, 1;
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;
    """
    )
    with pytest.raises(BadAccess, match="of its own block only"):
        execute(program, aligned(16), aligned(16), shared=64, blocks=2, cluster=2)
