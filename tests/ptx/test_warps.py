"""Threads of a warp with each other, against what the manual writes down."""

import numpy as np
import pytest

from .errors import Deadlock, MachineError, Unsupported
from .programs import execute

LANES = np.arange(32)
VALUES = (LANES * 7 + 3).astype(np.uint32)
_HEAD = """
.reg .pred %p<8>;
.reg .b32 %r<16>;
.reg .b64 %rd<8>;
ld.param.u64 %rd1, [p0];
ld.param.u64 %rd2, [p1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
ld.global.u32 %r2, [%rd1];
"""
_TAIL = "\nst.global.u32 [%rd2], %r3;\n"


def result(body: str, values: np.ndarray = VALUES, threads: int = 32) -> np.ndarray:
    """What ``body`` leaves in %r3, from values in %r2."""
    given, found = np.ascontiguousarray(values), np.zeros(threads, np.uint32)
    execute(_HEAD + body + _TAIL, given, found, threads=threads)
    return found


def by_hand(mode: str, b: int, c: int) -> list[tuple[int, bool]]:
    """The pseudocode of the manual, a lane at a time: (source lane, predicate)."""
    found = []
    for lane in range(32):
        bval, cval, mask = b & 31, c & 31, (c >> 8) & 31
        largest = (lane & mask) | (cval & ~mask & 31)
        least = lane & mask
        if mode == "up":
            j, valid = lane - bval, lane - bval >= largest
        elif mode == "down":
            j, valid = lane + bval, lane + bval <= largest
        elif mode == "bfly":
            j, valid = lane ^ bval, lane ^ bval <= largest
        else:
            j = least | (bval & ~mask & 31)
            valid = j <= largest
        found.append((j if valid else lane, valid))
    return found


def test_shfl_pseudocode_by_known_cases():
    """Down by 1 in segments of 8, and up by 1: written from CUDA's __shfl_down_sync(.., 1, 8)."""
    down = result("shfl.sync.down.b32 %r3, %r2, 1, 0x181f, -1;")
    assert down.tolist() == [int(VALUES[n if n % 8 == 7 else n + 1]) for n in range(32)]
    up = result("shfl.sync.up.b32 %r3, %r2, 1, 0, -1;")
    assert up.tolist() == [int(VALUES[max(0, n - 1)]) for n in range(32)]
    bfly = result("shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;")
    assert bfly.tolist() == [int(VALUES[(n + 16) % 32]) for n in range(32)]
    first = result("shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;")
    assert set(first.tolist()) == {int(VALUES[5])}


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(
    "b, c", [(1, 31), (3, 0), (9, 0x1C1F), (17, 0x101F), (30, 12), (2, 0x1800)]
)
def test_shfl_follows_the_pseudocode(mode, b, c):
    expected = by_hand(mode, b, c)
    constant = result(f"shfl.sync.{mode}.b32 %r3|%p1, %r2, {b}, {c}, -1;")
    computed = result(
        f"mov.u32 %r5, {b}; mov.u32 %r6, {c}; shfl.sync.{mode}.b32 %r3, %r2, %r5, %r6, 0xffffffff;"
    )
    assert constant.tolist() == computed.tolist() == [int(VALUES[j]) for j, _ in expected]
    valid = result(f"shfl.sync.{mode}.b32 %r4|%p1, %r2, {b}, {c}, -1; selp.b32 %r3, 1, 0, %p1;")
    assert valid.tolist() == [int(v) for _, v in expected]


def test_shfl_index_of_each_lane():
    found = result(
        "xor.b32 %r5, %r1, 3; shfl.sync.idx.b32 %r3, %r2, %r5, 31, -1;", np.tile(VALUES, 2), 64
    )
    assert found.tolist() == 2 * [int(VALUES[n ^ 3]) for n in range(32)]


def test_shfl_into_its_own_source():
    found = result("shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1; mov.b32 %r3, %r2;")
    assert found.tolist() == [int(VALUES[n ^ 1]) for n in range(32)]


def test_votes():
    odd = "and.b32 %r5, %r2, 1; setp.eq.u32 %p1, %r5, 1;"
    values = (LANES % 3 == 0).astype(np.uint32)
    ballot = result(odd + "vote.sync.ballot.b32 %r3, %p1, -1;", values)
    assert set(ballot.tolist()) == {sum(1 << n for n in range(0, 32, 3))}
    for given, all_, any_, uni in (
        (values, 0, 1, 0),
        (np.zeros(32), 0, 0, 1),
        (np.ones(32), 1, 1, 1),
    ):
        for mode, expected in (("all", all_), ("any", any_), ("uni", uni)):
            body = odd + f"vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 %r3, 1, 0, %p2;"
            assert set(result(body, given.astype(np.uint32)).tolist()) == {expected}, mode


@pytest.mark.parametrize(
    "operation, expected",
    [
        ("add.u32", int(VALUES.sum()) + 32 * 2**31 & 2**32 - 1),
        ("min.u32", 2**31 + 3),
        ("max.u32", 2**31 + 220),
        ("min.s32", 3 - 2**31 & 2**32 - 1),
        ("max.s32", 220 - 2**31 & 2**32 - 1),
        ("and.b32", 2**31),
        ("or.b32", 2**31 + 255),
        ("xor.b32", int(np.bitwise_xor.reduce(VALUES))),
    ],
)
def test_redux(operation, expected):
    found = result(f"redux.sync.{operation} %r3, %r2, -1;", VALUES + np.uint32(2**31))
    assert set(found.tolist()) == {expected}


def test_redux_signed_with_both_signs():
    values = np.where(LANES == 9, -5, LANES).astype(np.int32).view(np.uint32)
    assert result("redux.sync.min.s32 %r3, %r2, -1;", values)[0] == 2**32 - 5
    assert result("redux.sync.min.u32 %r3, %r2, -1;", values)[0] == 0


def test_elect_has_one_leader_a_warp():
    found = result("elect.sync %r4|%p1, -1; selp.b32 %r3, 1, 0, %p1;", np.zeros(64, np.uint32), 64)
    assert found.reshape(2, 32).sum(axis=1).tolist() == [1, 1]
    same = result("elect.sync %r3|%p1, -1;")
    assert len(set(same.tolist())) == 1
    assert result("elect.sync _|%p1, -1; selp.b32 %r3, 1, 0, %p1;").sum() == 1


def test_elect_among_those_that_are_left():
    body = "setp.lt.u32 %p2, %r1, 3; @%p2 ret; elect.sync %r3|%p1, -1;"
    assert result(body).tolist() == [0] * 3 + [3] * 29


def test_match():
    values = (LANES % 3).astype(np.uint32)
    expected = [sum(1 << m for m in range(32) if m % 3 == n % 3) for n in range(32)]
    assert result("match.any.sync.b32 %r3, %r2, -1;", values).tolist() == expected
    all_ = "match.all.sync.b32 %r3|%p1, %r2, -1; @!%p1 mov.b32 %r3, 77;"
    assert set(result(all_, values).tolist()) == {77}
    assert set(result(all_, np.full(32, 9, np.uint32)).tolist()) == {2**32 - 1}


def test_activemask_is_who_is_there():
    body = """
    mov.u32 %r3, 0;
    setp.ge.u32 %p1, %r1, 4; @%p1 bra SKIP;
    activemask.b32 %r3;
    SKIP:
    """
    assert result(body).tolist() == [15] * 4 + [0] * 28


def test_other_masks_are_refused():
    for body in (
        "shfl.sync.idx.b32 %r3, %r2, 0, 31, 15;",
        "mov.b32 %r4, 15; vote.sync.ballot.b32 %r3, %p1, %r4;",
        "bar.warp.sync 1;",
    ):
        with pytest.raises(Unsupported, match=r"member mask 0x[0-9a-f]+"):
            result(body)
    result("mov.b32 %r4, -1; bar.warp.sync %r4; shfl.sync.idx.b32 %r3, %r2, 0, 31, %r4;")


def test_unknown_forms_are_refused():
    for body in (
        "shfl.sync.bfly.b64 %r3, %r2, 0, 31, -1;", "shfl.bfly.b32 %r3, %r2, 0, 31;",
        "vote.all.pred %p1, %p2;", "redux.sync.add.f32 %r3, %r2, -1;", "match.any.b32 %r3, %r2, -1;",
    ):  # fmt: skip
        with pytest.raises(Unsupported, match=r"is not known"):
            result(body)


def test_reading_a_lane_that_has_ended():
    with pytest.raises(MachineError, match=r"lane 0 of warp 0, which has ended"):
        result("setp.lt.u32 %p2, %r1, 3; @%p2 ret; shfl.sync.idx.b32 %r3, %r2, 0, 31, -1;")
    body = "setp.lt.u32 %p2, %r1, 3; @%p2 ret; shfl.sync.idx.b32 %r3, %r2, 9, 31, -1;"
    assert result(body).tolist() == [0] * 3 + [int(VALUES[9])] * 29


def test_a_warp_that_is_parted_at_shfl_waits_for_ever():
    body = """
    setp.lt.u32 %p2, %r1, 3; @%p2 bra OTHER;
    shfl.sync.idx.b32 %r3, %r2, 9, 31, -1;
    bra END;
    OTHER:
    shfl.sync.idx.b32 %r3, %r2, 9, 31, -1;
    END:
    """
    with pytest.raises(Deadlock, match=r"warp 0 waits for the rest of its warp at PTX line"):
        result(body)


def test_a_guard_that_parts_a_warp():
    with pytest.raises(MachineError, match=r"guard parts"):
        result("setp.lt.u32 %p2, %r1, 3; @%p2 shfl.sync.idx.b32 %r3, %r2, 9, 31, -1;")
