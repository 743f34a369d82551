"""What is wrong with a text or a launch is one clear error, which names it and its line."""

import struct

import numpy as np
import pytest

from .errors import BadAccess, BadBarrier, Deadlock, MachineError, Unsupported
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import Launch, Machine
from .parser import parse

TEXT = """.version 8.7
.target {target}
.address_size 64
.shared .align 8 .b8 room[64];
.visible .entry kernel(.param .u64 p0)
{head}{{
.reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %rd<4>; .reg .f64 %d<4>;
{body}
ret;
}}
"""
LINE = 8  # of the body


def text(body: str = "", target: str = "sm_90a", head: str = "") -> str:
    return TEXT.format(body=body, target=target, head=head)


def launch(whole: str, threads=32, grid=(1, 1, 1), cluster=1, dynamic=0, parameters=None) -> None:
    array, memory = np.zeros(4096, np.uint8), GlobalMemory()
    memory.add(Allocation(array.ctypes.data, array.nbytes, name="p0"))
    data = struct.pack("Q", array.ctypes.data) if parameters is None else parameters
    run(Launch(parse(whole), grid, threads, data, dynamic, cluster, memory))


def test_a_text_that_ends_anywhere():
    """Whatever is cut off, the error is the machine's."""
    whole = text("ld.param.u64 %rd1, [p0]; @!%p1 bra L; L: st.global.v2.b32 [%rd1+8], {%r1, 2};")
    launch(whole)
    for end in range(whole.rindex("}")):
        with pytest.raises(Unsupported):
            parse(whole[:end])


@pytest.mark.parametrize("whole", ["", "\n", "\0ELF", "// .entry", ".visible .entry", ".entry ("])
def test_a_text_without_a_kernel(whole):
    with pytest.raises(Unsupported, match=r"no \.entry|ends inside an entry"):
        parse(whole)


@pytest.mark.parametrize("target", ["", "sm_70", "sm_100", "sm_100a", "sm_120", "compute_90"])
def test_a_target_that_is_not_known(target):
    with pytest.raises(Unsupported, match=f"target '{target}' is not known; known are sm_80"):
        launch(text(target=target))


@pytest.mark.parametrize("changes, said", [
    (dict(threads=33), "a block of 33 threads"), (dict(threads=0), "a block of 0 threads"),
    (dict(threads=-32), "a block of -32"), (dict(threads=1056), "a block of 1056 threads"),
    (dict(head=".reqntid 64\n"), r"32 threads, where \.reqntid says \(64, 1, 1\)"),
    (dict(head=".reqntid 16, 2\n"), r"\.reqntid says \(16, 2, 1\)"),
    (dict(head=".maxnreg 256\n"), r"\.maxnreg 256 for 32 threads"),
    (dict(head=".maxnreg 128\n", threads=1024), r"\.maxnreg 128 for 1024 threads"),
    (dict(dynamic=300_000), "300064 bytes of shared memory; sm_90a has 232448"),
    (dict(dynamic=-16), "-16 bytes of shared memory"),
    (dict(grid=(0, 1, 1)), r"a grid of \(0, 1, 1\)"), (dict(grid=(1, 1, 0)), "a grid of"),
    (dict(grid=(1, 65536, 1)), "a grid of"), (dict(grid=(1, 1)), "a grid of"),
    (dict(grid=(3, 1, 1), cluster=2), "3 blocks are no whole clusters of 2"),
    (dict(cluster=0), "a cluster of 0 blocks"), (dict(grid=(16, 1, 1), cluster=16), "wanted 1 to 8"),
    (dict(grid=(2, 1, 1), cluster=2, target="sm_80"), "sm_80 has no clusters"),
    (dict(parameters=b"1234"), "4 bytes of parameters, of 8"),
], ids=str)  # fmt: skip
def test_a_launch_that_a_gpu_would_refuse(changes, said):
    whole = text(**{name: changes.pop(name) for name in ("head", "target") if name in changes})
    with pytest.raises(Unsupported, match=f"^kernel.*{said}"):
        launch(whole, **changes)


KNOWN = "is not known"
FORM = "its modifiers and operands are of no form that is known"
LINES = [
    ("call.uni foo;", "function 'foo' has no body"), ("call (%r1), foo, (%r2);", "'foo' has no body"),
    ("call.uni %rd1;", "indirect"), ("mov.b32 (%r1), %r2;", "expected"), ("call;", "indirect"),
    ("ld.local.b32 %r1, [%rd1];", KNOWN), (".local .b8 depot[16];", "directive '.local' is not"),
    ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;", KNOWN),
    ("trap;", KNOWN), ("tex.2d.v4.f32.f32 {%r1, %r1, %r1, %r1}, [%rd1, {%r1, %r1}];", KNOWN),
    ("bra nowhere;", "no label 'nowhere'"), ("bra 5;", "no label"), ("bra [%r1];", "no label"),
    ("bra;", FORM), ("brx.idx %r1, T;", "opcode brx.idx is not known"),
    ("L: L:", "'L' is declared twice"), (".reg .b32 %r1;", "'%r1' is declared twice"),
    ("add.u32 %r1, %r9, 1;", "register '%r9' is not known"),
    ("mov.u32 %q1, %r1;", "register '%q1' is not known"),
    ("ld.global.u32 %r1, [%q1+4];", "register '%q1' is not known"),
    ("mov.b64 {%r1, %q1}, %rd1;", "register '%q1' is not known"),
    ("mov.u32 %r1, %smid;", "register '%smid' is not known"),
    ("mov.u64 %rd1, nothing;", "name 'nothing' is not known"),
    ("@%q1 add.u32 %r1, %r1, 1;", "the guard '%q1' is no predicate"),
    ("@%r1 add.u32 %r1, %r1, 1;", "the guard '%r1' is no predicate"), ("@;", "predicate"),
    ("ld.param.u64 %rd1, [p0+8];", "bytes 8 to 16 of 8"), ("ld.param.u64 %rd1, [p0+-8];", "bytes -8"),
    ("ld.param.u64 %rd1, [room];", "room is no parameter"),
    ("ld.param.u32 %r1, [p0+2];", "bytes 2 to 6"), ("ld.param.u64 %rd1, [%rd1];", "no parameter"),
    ("tanh.approx.f64 %d1, %d1;", KNOWN), ("add.f64 %r1, %d2, %d3;", "too small for f64"),
    ("add.u32 %r1, %r1;", KNOWN), ("add;", FORM), ("mov.u32 %r1;", FORM), ("mov.u32 5, %r1;", "no register"),
    ("selp.u32 %r1, %r1, %r1, %r1;", "is b32, not pred"), ("shl.b32 %r1, %r1, 1.5;", FORM),
    ("cp.async.bulk.tensor;", FORM), ("tensormap.replace;", FORM), ("mbarrier;", FORM), ("wgmma;", FORM),
    ("cp.async.wait_group %r1;", FORM), ("setmaxnreg.inc.sync.aligned.u32 %r1;", FORM),
    ("setmaxnreg.inc.sync.aligned.u32 264;", "multiple of 8 from 24 to 256"),
    (".reg .b32 %q<x>;", "whole number"), (".reg .b32 %q<999999999>;", "more than 131072 registers"),
    (".reg .b33 %q;", "type '.b33' is not known"), (".shared .b8 x[y];", "whole number"),
    (".shared .q8 x[4];", "type '.q8' is not known"), (".shared .b8 x[4;", r"expected '\]'"),
    (".loc x 1 1", "whole number"), (".loc 1 1 1, foo bar", "'foo' of a .loc is not known"),
    (".maxntid;", "whole number"), ("ld.global.u32 %r1, [%rd1+", "expected"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r1}, {%r2}, {%r3};", "registers"),
    ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 %r1, %r1, %r1, %r1;", FORM),
]  # fmt: skip


@pytest.mark.parametrize("body, said", LINES, ids=[line for line, _ in LINES])
def test_a_line_that_is_not_known(body, said):
    with pytest.raises(MachineError, match=rf"^PTX line ({LINE}|{LINE + 1})[: ](?s:.*){said}"):
        launch(text(body))


@pytest.mark.parametrize("target, body, least", [
    ("sm_80", "wgmma.fence.sync.aligned;", "sm_90a"), ("sm_90", "wgmma.fence.sync.aligned;", "sm_90a"),
    ("sm_90", "setmaxnreg.dec.sync.aligned.u32 40;", "sm_90a"),
    ("sm_80", "elect.sync _|%p1, -1;", "sm_90"), ("sm_80", "barrier.cluster.arrive;", "sm_90"),
    ("sm_80", "cp.async.bulk.commit_group;", "sm_90"),
    ("sm_80", "mbarrier.try_wait.parity.shared.b64 %p1, [room], 0;", "sm_90"),
])  # fmt: skip
def test_an_instruction_of_a_later_target(target, body, least):
    with pytest.raises(Unsupported, match=f"PTX line {LINE}.*\n.* needs {least}, this is {target}"):
        launch(text(body, target))


@pytest.mark.parametrize("body, error, said", [
    ("ld.global.u32 %r1, [0];", BadAccess, "4 bytes at 0x0 are in no allocation"),
    ("ld.shared.u32 %r1, [0];", BadAccess, "outside the block's 64 bytes"),
    ("LOOP: add.u32 %r1, %r1, 1; bra LOOP;", Deadlock, "1000 instructions of warps were executed"),
    ("bar.sync 16;", BadBarrier, "there are 16"), ("bar.sync 0, 33;", BadBarrier, "33 threads"),
    ("mbarrier.arrive.shared.b64 _, [room];", BadBarrier, "no mbarrier was initialised"),
    ("wgmma.fence.sync.aligned;", Deadlock, "the rest of its warpgroup"),
    ("cp.async.bulk.prefetch.tensor.2d.L2.global [p0, {%r1, %r1}];", Unsupported, KNOWN),
    ("ld.param.u64 %rd1, [p0]; add.u64 %rd1, %rd1, 16; prefetch.tensormap [%rd1];", BadAccess,
     "of a tensor map is no multiple of 64|never encoded"),
])  # fmt: skip
def test_a_program_that_goes_wrong(body, error, said, monkeypatch):
    monkeypatch.setattr(Machine, "limit", 1000)
    with pytest.raises(error, match=rf"(?s)PTX line {LINE}.*({said})|{said}.*PTX line {LINE}"):
        launch(text(body))
