"""Bulk copies against numpy's slices and the swizzle tables of the PTX manual."""

import numpy as np
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
    store_program,
    to_global,
    wait,
)  # fmt: skip
from .errors import BadAccess
from .machine import EARLY, LATE, Mode
from .programs import execute

MODES = (EARLY, LATE, Mode(late=True, shuffled=True, seed=2))

# PTX ISA, "swizzling modes": which unit of 16 bytes stands where in each line of 128 bytes
LINES = {
    0: ["01234567"],
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654",
          "45670123", "54761032", "67452301", "76543210"],
}  # fmt: skip


def swizzled(data: np.ndarray, swizzle: int) -> np.ndarray:
    """Bytes in the order that the manual's tables give (line n is table n modulo its length)."""
    lines, table = data.view(np.uint8).reshape(-1, 8, 16), LINES[swizzle]
    order = [[int(c) for c in table[n % len(table)]] for n in range(len(lines))]
    return np.stack([line[o] for line, o in zip(lines, order)]).reshape(-1)


def boxed(array: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A box of an array, all outermost first, with zeros outside."""
    pad = 300 if array.ndim < 3 else 8
    wide = np.pad(array, pad)
    return wide[tuple(slice(s + pad, s + pad + n) for s, n in zip(start, shape))].copy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (3, -2), (-5, 40), (17, 69), (50, 0)])
def test_load_of_two_dimensions(swizzle, start, mode):
    source = counting((20, 80))[:, :72]
    columns = swizzle // 2 or 24
    want = boxed(source, start, (16, columns))
    packed = map_of(source, (columns, 16), swizzle)
    got, _ = loaded(load_program(want.nbytes, start[::-1]), packed, source.base, want.nbytes, mode)
    assert (got == swizzled(want, swizzle)).all()


@pytest.mark.parametrize("shape, start, box, dtype", [
    ((50,), (44,), (16,), np.uint8),
    ((3, 5, 16), (1, -2, 4), (2, 4, 8), np.uint32),
    ((2, 3, 4, 16), (0, 2, -1, 2), (2, 2, 3, 8), np.uint16),
    ((2, 3, 2, 4, 16), (1, 0, -1, 2, 12), (2, 3, 2, 3, 8), np.uint16),
    ((5, 32), (2, 30), (4, 4), np.uint64),
])  # fmt: skip
def test_load_of_other_dimensions(shape, start, box, dtype):
    source = counting(shape, dtype)
    want = boxed(source, start, box)
    packed = map_of(source, box[::-1])
    got, _ = loaded(load_program(want.nbytes, start[::-1]), packed, source, want.nbytes)
    assert (got.view(dtype).reshape(box) == want).all()


def test_element_strides_skip_rows_and_make_the_box_smaller():
    """Steps of 3 over 10 rows are 4 rows; the first dimension's step is ignored."""
    source = counting((20, 32))
    packed = map_of(source, (16, 10), element_strides=(2, 3))
    got, _ = loaded(load_program(128, (8, -3)), packed, source, 128)
    want = np.concatenate([np.zeros((1, 16)), source[0:9:3, 8:24]])
    assert (got.view(np.uint16).reshape(4, 16) == want).all()


def test_fill_with_nan():
    source = counting((4, 16)).view(np.float16)
    packed = map_of(source, (16, 8), fill=1)
    got, _ = loaded(load_program(256, (0, 0)), packed, source, 256)
    assert (got[:128] == source.view(np.uint8).reshape(-1)).all()
    assert np.isnan(got[128:].view(np.float16)).all()


def test_counts_are_of_what_is_inside_the_tensor():
    """12 rows of 100 bytes: from an address that is 4 past a multiple of 32, 4 sectors each."""
    source = counting((12, 80))[:, :52]
    packed = map_of(source, (64, 16))
    _, counts = loaded(load_program(2048, (2, 0)), packed, source.base, 2048, counted=True)
    assert counts.loaded == 12 * 100
    assert counts.stored == 2048
    assert counts.sectors == 12 * 4 + 2048 // 32
    assert counts.least == -(-1200 // 32) + 2048 // 32


MULTICAST = (
    HEAD
    + """
add.u32 %r2, %r0, 16384;
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
@%p0 fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r3, %cluster_ctarank;
setp.eq.u32 %p1, %r3, 0;
and.pred %p1, %p1, %p0;
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 512;
mov.u16 %h0, {mask};
@%p1 {load}.multicast::cluster [%r0], [%rd0, {{0, 2}}], [%r2], %h0;
{wait}
mov.u32 %r4, %ctaid.x;
mul.wide.u32 %rd3, %r4, 512;
add.u64 %rd1, %rd1, %rd3;
{copy}
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
"""
)


@pytest.mark.parametrize("mode", MODES)
def test_multicast_writes_to_each_block_of_the_mask(mode):
    source = counting((8, 32))
    program = MULTICAST.format(mask=3, load=LOAD.format(n=2), wait=wait("%r2"), copy=to_global(512))
    out = aligned((4, 512))
    execute(program, map_of(source, (32, 8)), out, source, shared=BARRIER + 64, blocks=4,
            cluster=2, mode=mode)  # fmt: skip
    want = boxed(source, (2, 0), (8, 32)).view(np.uint8).reshape(-1)
    assert (out == want).all()


def test_a_mask_of_blocks_that_are_not_in_the_cluster():
    source = counting((8, 32))
    program = MULTICAST.format(mask=5, load=LOAD.format(n=2), wait=wait("%r2"), copy=to_global(512))
    with pytest.raises(BadAccess, match="a mask of 0x5 blocks in a cluster of 2"):
        execute(program, map_of(source, (32, 8)), aligned(1024), source, shared=BARRIER + 64,
                blocks=2, cluster=2)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (3, -2), (-5, 40), (50, 0)])
@pytest.mark.parametrize("end", ["wait_group.read 0", "wait_group 0"])
def test_store_writes_what_is_inside(swizzle, start, mode, end):
    columns = swizzle // 2 or 24
    target, box = aligned((20, 80), np.uint16), counting((16, columns))
    packed = map_of(target[:, :72], (columns, 16), swizzle)
    given = aligned(box.nbytes)
    given[:] = swizzled(box, swizzle)
    program = store_program(box.nbytes, start[::-1], end=f"cp.async.bulk.{end};")
    execute(program, packed, given, target, shared=BARRIER, mode=mode)
    want = np.zeros((620, 680), np.uint16)
    want[300 + start[0] : 316 + start[0], 300 + start[1] : 300 + start[1] + columns] = box
    want = want[300:320, 300:380]
    want[:, 72:] = 0
    assert (target == want).all()


@pytest.mark.parametrize("wait_for, seen", [
    ("wait_group.read 0", 0), ("wait_group 1", 1), ("wait_group 0", 2),
])  # fmt: skip
def test_late_stores_are_seen_after_their_groups_wait(wait_for, seen):
    """Two groups of one store each; what of them a load sees in mode late."""
    program = (
        HEAD
        + f"""
    ld.param.u64 %rd2, [p2];
    shl.b32 %r2, %r1, 4;
    add.u32 %r2, %r2, %r0;
    mov.u32 %r3, 7;
    st.shared.v4.u32 [%r2], {{%r3, %r3, %r3, %r3}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p0 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r0], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r0+16], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.{wait_for};
    ld.global.u32 %r4, [%rd0];
    ld.global.u32 %r5, [%rd1];
    st.global.v2.u32 [%rd2], {{%r4, %r5}};
    cp.async.bulk.wait_group.read 0;
    END:
    """
    )
    first, second, found = aligned(16), aligned(16), aligned(16)
    execute(program, first, second, found, shared=512, mode=Mode(late=True))
    assert found.view(np.uint32)[:2].tolist() == [7 * (seen > 0), 7 * (seen > 1)]
    assert (first.view(np.uint32) == 7).all()
    assert (second.view(np.uint32) == 7).all()


@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_in_a_row(space, mode):
    source, out = counting((256,)), aligned(512)
    program = (
        HEAD
        + f"""
    add.u32 %r2, %r0, 1024;
    @%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    mov.u32 %r3, 480;
    @%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], %r3;
    mov.b64 %rd5, 0;
    @%p0 cp.async.bulk.{space}.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [%r0+16], [%rd0+32], %r3, [%r2], %rd5;
    {wait("%r2")}
    @%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r0+16], %r3;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    """
    )
    execute(program, source, out, shared=1032, mode=mode)
    assert (out[:480] == source.view(np.uint8)[32:]).all()
    assert not out[480:].any()
