"""atom and red: threads with one address take turns."""

import numpy as np
import pytest

from .errors import BadAccess, Unsupported
from .programs import execute

HEAD = """
.reg .pred p; .reg .b16 h; .reg .b32 i, v, n, old; .reg .b64 a, b, at; .reg .f32 f; .reg .b64 w;
mov.u32 i, %tid.x;
ld.param.u64 a, [p0]; ld.param.u64 b, [p1];
mul.wide.u32 at, i, 4; add.s64 b, b, at;
"""
END = "st.global.b32 [b], old;"


def atomics(line, memory, threads=64, prepare="", end=END):
    """Each thread executes ``line``; the memory after it is ``memory``, and what each got."""
    found = np.zeros(threads, np.uint32)
    execute(HEAD + prepare + line + end, memory, found, threads=threads)
    return found


def test_each_thread_gets_what_was_there():
    memory = np.array([100], np.uint32)
    found = atomics("atom.global.add.u32 old, [a], 3;", memory)
    assert memory[0] == 100 + 3 * 64
    assert sorted(found.tolist()) == [100 + 3 * n for n in range(64)]


def test_order_and_scope_are_accepted():
    for words in ("global.gpu.acq_rel", "relaxed.gpu.global", "global.sys.relaxed"):
        memory = np.zeros(8, np.uint32)
        prepare = "and.b32 n, i, 7; mul.wide.u32 at, n, 4; add.s64 a, a, at;"
        atomics(f"atom.{words}.add.u32 old, [a], 1;", memory, prepare=prepare)
        assert memory.tolist() == [8] * 8


def test_operations_on_integers():
    for name, type_, start, wanted in (
        ("min", "u32", 50, 0), ("max", "u32", 50, 63), ("min", "s32", 2**32 - 5, 2**32 - 5),
        ("max", "s32", 2**32 - 5, 63), ("and", "b32", 0xFFFF, 0), ("or", "b32", 0x100, 0x13F),
        ("xor", "b32", 7, 7), ("add", "u32", 1, 2017), ("add", "s32", 2**32 - 1, 2015),
    ):  # fmt: skip
        memory = np.array([start], np.uint32)
        atomics(f"red.global.gpu.relaxed.{name}.{type_} [a], i;", memory, end="")
        assert memory[0] == wanted, name


def test_exchange_and_compare():
    memory = np.array([7], np.uint32)
    found = atomics("atom.global.exch.b32 old, [a], i;", memory)
    assert memory[0] == 63 and found.tolist() == [7, *range(63)]
    memory = np.array([5], np.uint32)  # thread 5 finds 5 and puts 105, nobody else finds its number
    found = atomics("add.u32 v, i, 100; atom.global.cas.b32 old, [a], i, v;", memory)
    assert memory[0] == 105 and found.tolist() == [5] * 6 + [105] * 58


def test_counters_go_round():
    memory = np.array([0], np.uint32)
    found = atomics("atom.global.inc.u32 old, [a], 2;", memory, threads=32)
    assert found.tolist() == [n % 3 for n in range(32)] and memory[0] == 32 % 3
    memory = np.array([9], np.uint32)  # larger than the limit: the limit
    found = atomics("atom.global.dec.u32 old, [a], 2;", memory, threads=32)
    assert found.tolist() == [9] + [(2 - n) % 3 for n in range(31)]


def test_sums_of_floats_are_rounded_one_after_another():
    memory = np.array([2.0**24], np.float32)
    atomics("red.global.add.f32 [a], 0f3F800000;", memory, end="")
    assert memory[0] == 2.0**24  # each 1 is lost in its own rounding
    memory = np.array([0], np.float32)  # subnormal numbers are flushed in global memory
    atomics("red.global.add.f32 [a], 0f00000001;", memory, end="")
    assert memory[0] == 0
    memory = np.array([0.5], np.float64)
    atomics("red.global.gpu.add.f64 [a], 0d3FF0000000000000;", memory, end="")
    assert memory[0] == 64.5
    memory = np.array([0x3F804080, 0], np.uint32)  # bf16: 1 and 4, 64 times 1 and 0.5
    atomics("red.global.add.noftz.bf16x2 [a], 0x3F803F00;", memory, end="")
    assert memory[0] == 0x42824210  # 65 and 36
    memory = np.array([0x3C00], np.uint16)
    atomics("mov.b16 h, 0x3C00; atom.global.add.noftz.f16 h, [a], h;", memory, end="")
    assert memory[0] == 0x5410  # 65


def test_shared_memory():
    body = """
    .reg .pred p; .reg .b32 i, n, old; .reg .b64 a, at;
    mov.u32 i, %tid.x; setp.lt.u32 p, i, 1;
    @p st.shared.b32 [memory], 0;
    bar.sync 0;
    atom.shared.add.u32 old, [memory], 1;
    bar.sync 0;
    ld.shared.b32 n, [memory];
    ld.param.u64 a, [p0]; mul.wide.u32 at, i, 8; add.s64 a, a, at;
    st.global.v2.b32 [a], {old, n};
    """
    found = np.zeros((128, 2), np.uint32)
    execute(body, found, threads=64, blocks=1, shared=16)
    assert sorted(found[:64, 0].tolist()) == list(range(64)) and (found[:64, 1] == 64).all()
    with pytest.raises(BadAccess, match="nobody wrote"):
        execute(body.replace("@p st.shared.b32 [memory], 0;", ""), found, threads=64, shared=16)


@pytest.mark.parametrize("line", [
    "atom.add.u32 old, [a], 1;", "red.global.add.f16x2 [a], v;", "atom.global.min.f32 old, [a], v;",
    "red.global.add.v2.f32 [a], {v, v};", "atom.global.add.s64 w, [a], w;", "red.global.cas.b32 [a], v, v;",
    "atom.global.exch.b128 w, [a], w;", "red.async.relaxed.cluster.add.u32 [a], v, [b];",
])  # fmt: skip
def test_unknown_forms_are_refused(line):
    with pytest.raises(Unsupported, match="PTX line"):
        atomics(line, np.zeros(4, np.uint32))
