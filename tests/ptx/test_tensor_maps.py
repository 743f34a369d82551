"""Tensor maps: their bytes, their rules, and how kernels make and find them."""

import struct

import numpy as np
import pytest

from .bulk_programs import (
    HEAD,
    aligned,
    counting,
    load_program,
    loaded,
    map_of,
    to_global,
    wait,
)
from .errors import BadAccess, BadBarrier, MachineError, Race, Unsupported
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import EARLY, Launch, Mode
from .parser import parse
from .programs import execute
from .tensor_maps import TensorMap

GOOD = TensorMap(
    address=0x7000, element=10, sizes=(100, 50), strides=(208,), box=(64, 32),
    element_strides=(1, 1), swizzle=3,
)  # fmt: skip


def test_the_bytes_of_a_map():
    """The layout, written out."""
    data = GOOD.pack()
    assert len(data) == 128
    assert struct.unpack_from("<QIIIII", data, 0) == (0x7000, 2, 10, 0, 3, 0)
    assert struct.unpack_from("<5I", data, 28) == (64, 32, 0, 0, 0)
    assert struct.unpack_from("<5I", data, 48) == (1, 1, 0, 0, 0)
    assert struct.unpack_from("<5I", data, 68) == (100, 50, 0, 0, 0)
    assert struct.unpack_from("<4Q", data, 88) == (208, 0, 0, 0)
    assert data[120:] == b"PTXTMAP1"
    assert TensorMap.unpack(data) == GOOD


@pytest.mark.parametrize("changes, error, said", [
    (dict(address=0x7008), BadAccess, "address 0x7008: wanted a multiple of 16"),
    (dict(strides=(200,)), BadAccess, "stride 200: wanted a multiple of 16"),
    (dict(strides=(1 << 40,)), BadAccess, r"wanted less than 2\^40"),
    (dict(sizes=(0, 50)), BadAccess, r"sizes \(0, 50\)"),
    (dict(box=(64, 257)), BadAccess, r"box \(64, 257\): wanted 1 to 256"),
    (dict(box=(64, 0)), BadAccess, r"box \(64, 0\)"),
    (dict(box=(72, 32)), BadAccess, "swizzle 128 bytes whose box has rows of 144"),
    (dict(box=(12, 32), swizzle=0), BadAccess, "rows of 24 bytes: wanted a multiple of 16"),
    (dict(element_strides=(1, 9)), BadAccess, r"element strides \(1, 9\)"),
    (dict(fill=1, element=1), BadAccess, "integers that is filled with NaN"),
    (dict(fill=2), BadAccess, "fill mode 2"),
    (dict(interleave=1), Unsupported, "interleave layout 1"),
    (dict(element=11), Unsupported, "element type 11"),
    (dict(swizzle=4), Unsupported, "swizzle mode 4"),
])  # fmt: skip
def test_bad_maps(changes, error, said):
    with pytest.raises(error, match=said):
        TensorMap.unpack(TensorMap(**{**GOOD.__dict__, **changes}).pack())


def test_other_bytes_are_no_map():
    with pytest.raises(BadAccess, match="never encoded"):
        TensorMap.unpack(bytes(128))
    with pytest.raises(BadAccess, match="6 dimensions"):
        TensorMap.unpack(GOOD.pack()[:8] + struct.pack("<I", 6) + GOOD.pack()[12:])


# what Triton emits for a descriptor of a matrix of bf16, rows of %r5 of %r6 elements, box 8 x 64
REPLACE = """
@%p0 tensormap.replace.tile.global_address.{space}.b1024.b64 [ {at} + 0 ], %rd3;
@%p0 tensormap.replace.tile.rank.{space}.b1024.b32 [ {at} + 0 ], 0x1;
@%p0 tensormap.replace.tile.box_dim.{space}.b1024.b32 [ {at} + 0 ], 0x0, %r4;
@%p0 tensormap.replace.tile.box_dim.{space}.b1024.b32 [ {at} + 0 ], 0x1, 8;
@%p0 tensormap.replace.tile.global_dim.{space}.b1024.b32 [ {at} + 0 ], 0x0, %r6;
@%p0 tensormap.replace.tile.global_dim.{space}.b1024.b32 [ {at} + 0 ], 0x1, %r5;
@%p0 tensormap.replace.tile.global_stride.{space}.b1024.b64 [ {at} + 0 ], 0x0, %rd5;
@%p0 tensormap.replace.tile.element_stride.{space}.b1024.b32 [ {at} + 0 ], 0x0, %r7;
@%p0 tensormap.replace.tile.element_stride.{space}.b1024.b32 [ {at} + 0 ], 0x1, %r7;
@%p0 tensormap.replace.tile.elemtype.{space}.b1024.b32 [ {at} + 0 ], 0xa;
@%p0 tensormap.replace.tile.interleave_layout.{space}.b1024.b32 [ {at} + 0 ], 0x0;
@%p0 tensormap.replace.tile.swizzle_mode.{space}.b1024.b32 [ {at} + 0 ], 0x0;
@%p0 tensormap.replace.tile.fill_mode.{space}.b1024.b32 [ {at} + 0 ], 0x0;
"""
MAKE = (
    HEAD
    + """
ld.param.u64 %rd3, [p2];
mov.u32 %r4, 64;
mov.u32 %r5, 6;
mov.u32 %r6, 70;
mov.u32 %r7, 1;
mov.u64 %rd5, 160;
shl.b32 %r2, %r1, 2;
add.u32 %r8, %r0, %r2;
mov.u32 %r9, 0;
{zero}
bar.warp.sync -1;
cvt.u64.u32 %rd8, %r0;
{replace}
{publish}
bar.sync 0;
"""
)
ZERO = "st.shared.b32 [ %r8 + 0 ], %r9;"
COPY = """
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [ %rd0 + 0 ], [ %rd8 + 0 ], 0x80;
"""
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [ %rd0 + 0 ], 0x80;\n"
PUBLISH = COPY + ACQUIRE
USE = f"""
add.u32 %r2, %r0, 2048;
@%p0 mbarrier.init.shared::cta.b64 [%r2], 1;
bar.sync 0;
@%p0 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 1024;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%rd0, {{8, 1}}], [%r2];
{wait("%r2")} {to_global(1024)}
"""


def used(source: np.ndarray) -> np.ndarray:
    """What the box at row 1, column 8 of 6 x 70 of a matrix of rows of 80 is."""
    want = np.zeros((8, 64), np.uint16)
    want[:5, :62] = source[1:6, 8:70]
    return want


def make_and_use(zero=ZERO, space="shared::cta", publish=PUBLISH, mode=EARLY, unwritten=(0,)):
    replace = REPLACE.format(space=space, at="%rd8" if space == "shared::cta" else "%rd0")
    program = MAKE.format(zero=zero, replace=replace, publish=publish)
    source, scratch, out = counting((6, 80)), aligned(128), aligned(1024)
    execute(program + USE, scratch, out, source, shared=4096, mode=mode, unwritten=unwritten)
    assert (out.view(np.uint16).reshape(8, 64) == used(source)).all()
    return TensorMap.unpack(scratch.tobytes()), source


@pytest.mark.parametrize("mode", [Mode(), Mode(late=True), Mode(shuffled=True)])
def test_a_map_made_in_shared_memory(mode):
    made, source = make_and_use(mode=mode)
    assert made == TensorMap(source.ctypes.data, 10, (70, 6), (160,), (64, 8), (1, 1))


def test_a_map_changed_in_global_memory():
    made, source = make_and_use(space="global", publish=ACQUIRE, unwritten=())
    assert made == TensorMap(source.ctypes.data, 10, (70, 6), (160,), (64, 8), (1, 1))


def test_a_map_in_shared_memory_that_was_not_cleared():
    with pytest.raises(BadAccess, match="which nobody wrote"):
        make_and_use(zero="")


def test_a_map_that_was_not_copied():
    with pytest.raises(BadAccess, match=r"a tensor map at byte 0 of p0: nobody wrote it"):
        make_and_use(publish="")


@pytest.mark.parametrize("space, publish", [("shared::cta", COPY), ("global", "")])
def test_a_map_that_was_made_and_not_acquired(space, publish):
    with pytest.raises(Race, match=NOT_ACQUIRED):
        make_and_use(space=space, publish=publish, unwritten=())


NOT_ACQUIRED = (
    r"^PTX line \d+: @ %p0 cp\.async\.bulk\.tensor[^\n]*\n  warp 0 uses the tensor map at byte 0 of p0,"
    r" which this launch wrote, without fence\.proxy\.tensormap::generic\.acquire between"
)
STORE = "@%p0 ld.global.u32 %r9, [%rd0+{at}];\n@%p0 st.global.u32 [%rd0+{at}], %r9;\n"
WRITE = STORE.format(at=124)  # what is there already
RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"
OTHER = "setp.ge.u32 %p1, %r1, 32;\n@%p1 " + ACQUIRE
MEET = "bar.sync 0;\n"
BULK = """
mov.u32 %r9, 7;
@%p0 st.shared.v4.u32 [%r0], {%r9, %r9, %r9, %r9};
@%p0 fence.proxy.async.shared::cta;
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%rd0+112], [%r0], 16;
@%p0 cp.async.bulk.commit_group;
@%p0 cp.async.bulk.wait_group 0;
"""


def load_by(between: str, mode: Mode = EARLY) -> None:
    """Load by a map of the host's, with ``between`` before the copy."""
    source, packed = counting((16, 64)), aligned(256)
    packed[:128] = map_of(source, (64, 16))
    program = load_program(2048, (0, 0)).replace("bar.sync 0;", "bar.sync 0;\n" + between, 1)
    got, _ = loaded(program, packed, source, 2048, mode, threads=64)
    assert (got == source.view(np.uint8).reshape(-1)).all()


@pytest.mark.parametrize("mode", [Mode(), Mode(late=True), Mode(shuffled=True)])
@pytest.mark.parametrize("between", [
    "", WRITE + ACQUIRE, WRITE + RELEASE + ACQUIRE, WRITE + MEET + OTHER + MEET,
    WRITE + MEET + ACQUIRE + MEET + OTHER, STORE.format(at=128), STORE.format(at=252) + RELEASE,
])  # fmt: skip
def test_a_map_that_is_acquired_after_it_was_written(between, mode):
    load_by(between, mode)


@pytest.mark.parametrize("between", [
    WRITE, STORE.format(at=0), WRITE + RELEASE, ACQUIRE + WRITE, WRITE + ACQUIRE + WRITE,
    WRITE + MEET + OTHER, WRITE + "fence.proxy.async;\n" + MEET, BULK,
    WRITE + ACQUIRE.replace("+ 0", "+ 128"),
])  # fmt: skip
def test_a_map_that_was_written_and_not_acquired(between):
    with pytest.raises(Race, match=NOT_ACQUIRED):
        load_by(between)


def test_what_another_launch_wrote_needs_no_fence():
    source = counting((16, 64))
    packed = map_of(source, (64, 16))
    execute(HEAD + WRITE, packed, aligned(16))
    loaded(load_program(2048, (0, 0)), packed, source, 2048)


@pytest.mark.parametrize("form, error, said", [
    (ACQUIRE.replace("%rd0", "%rd15"), BadAccess, "in no allocation"),
    (ACQUIRE.replace("0x80", "64"), Unsupported, "not known"),
    (RELEASE.replace(";", " [%rd0], 128;"), Unsupported, "not known"),
    ("tensormap.replace.tile.rank.shared::cta.b1024.b64 [%r0], %rd1;", Unsupported, "not known"),
    ("tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r0], 0, 1;", Unsupported, "not known"),
    ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r0], 5, 1;", Unsupported, "not known"),
    ("tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r0], 4, 16;", Unsupported, "not known"),
    ("tensormap.replace.tile.swizzle_atomicity.shared::cta.b1024.b32 [%r0], 0;", Unsupported, "not known"),
    (COPY.replace("%rd8", "%r0").replace("0x80", "0x40"), Unsupported, "not known"),
    ("prefetch.global.L2 [%rd0];", Unsupported, "not known"),
    ("prefetch.tensormap [%rd1];", BadAccess, "never encoded"),
    ("prefetch.tensormap [%rd0+64];", BadAccess, "in no allocation"),
])  # fmt: skip
def test_other_forms_and_addresses(form, error, said):
    with pytest.raises(error, match=said):
        execute(HEAD + form, map_of(counting((8, 8)), (8, 8)), aligned(128), shared=1024)


PARAMETER = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry program(.param .align 128 .b8 given[256], .param .u64 result)
{{
.reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .pred %p<8>;
mov.b32 %r0, memory;
mov.u32 %r1, %tid.x;
setp.eq.u32 %p0, %r1, 0;
ld.param.u64 %rd1, [result];
mov.b64 %rd2, given;
add.s64 %rd3, %rd2, {offset};
cvta.param.u64 %rd0, %rd3;
prefetch.tensormap [%rd0];
{use}
ret;
}}
"""


def run_parameter(offset: int) -> None:
    source, out = counting((6, 80)), aligned(1024)
    packed = map_of(source[:, :70], (64, 8))
    entry = parse(PARAMETER.format(offset=offset, use=USE))
    memory = GlobalMemory()
    for array in (source, out):
        memory.add(Allocation(array.ctypes.data, array.nbytes))
    data = bytes(128) + packed.tobytes() + struct.pack("<Q", out.ctypes.data)
    run(Launch(entry, (1, 1, 1), 32, data, 4096, 1, memory))
    assert (out.view(np.uint16).reshape(8, 64) == used(source)).all()


def test_a_map_in_the_parameters():
    run_parameter(128)


@pytest.mark.parametrize("offset, said", [(0, "never encoded"), (32, "no multiple of 64"),
                                          (192, "outside them")])  # fmt: skip
def test_no_map_in_the_parameters(offset, said):
    with pytest.raises(MachineError, match=said):
        run_parameter(offset)


def test_a_map_over_an_mbarrier_is_caught():
    program = (
        HEAD
        + """
    @%p0 mbarrier.init.shared::cta.b64 [%r0+64], 1;
    bar.sync 0;
    @%p0 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r0], 1;
    """
    )
    with pytest.raises((BadBarrier, BadAccess)):
        execute(program, aligned(16), aligned(16), shared=1024)
