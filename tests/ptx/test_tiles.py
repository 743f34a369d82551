"""The estimate from counts, and that kernels/tiles.py says what was counted."""

import pytest

pytest.importorskip("triton")

import numpy as np

from pelt_fast.kernels.tile import Tile
from pelt_fast.kernels.tiles import TABLES

from . import sampled, tile_words
from .parser import parse
from .peaks import PEAKS, estimate, floor, resident
from .programs import WORD_OF_THREAD, program
from .sampled import Work
from .tile_rows import by_turns, places
from .tile_words import MARK, named, read, reasons

A100 = PEAKS["sm80"]
KNOWN = {"works", "left_out"}


def a_work(**changed) -> Work:
    nothing = dict.fromkeys(Work.__dataclass_fields__, 0)
    return Work(**{**nothing, "blocks": 108, "threads": 128, "registers": 64, "shared": 15 << 10,
                   **changed})  # fmt: skip


@pytest.mark.parametrize(
    "resource, changed, clocks",
    [
        ("issue", dict(instructions=4000), 1000),
        ("fp32", dict(fp32=1000), 500),
        ("special", dict(special=100), 200),
        ("tensor", dict(tensor=2048 * 70), 70),
        ("shared", dict(wavefronts=123), 123),
        ("l2", dict(sectors=200), 108 * 200 * 32 / 5120),
        ("dram", dict(dram=2_039_000_000_000 // 1_410_000), 1e3),
    ],
)
def test_a_resource_takes_its_work_over_its_peak(resource, changed, clocks):
    found = estimate([a_work(**changed)], A100)
    assert found.bound == resource
    assert found.clocks == pytest.approx(clocks, rel=2e-3)


def test_the_processor_with_most_programs_is_waited_for():
    assert estimate([a_work(blocks=109, wavefronts=10)], A100).clocks == 20


def test_launches_come_one_after_another_and_the_longest_binds():
    found = estimate([a_work(wavefronts=100), a_work(instructions=1200)], A100)
    assert (found.clocks, found.bound, found.issue) == (400, "issue", 0.75)
    assert (found.resident, found.waves) == (8, 1 / 8)


@pytest.mark.parametrize(
    "changed, programs",
    [
        (dict(), 8),  # registers: 64 x 128, of 65,536
        (dict(registers=65), 7),
        (dict(registers=16), 10),  # shared memory: 16 KiB of 164
        (dict(registers=16, shared=0, threads=512), 4),  # threads
        (dict(shared=164 << 10), 0),
    ],
)
def test_programs_of_a_processor(changed, programs):
    assert resident(a_work(**changed), A100) == programs


def test_the_floor_is_the_larger_of_bytes_and_flops():
    assert floor(A100.dram * 7, 0, 16, A100) == pytest.approx(7)
    assert floor(0, 108 * 2048 * 9, 16, A100) == pytest.approx(9)
    assert floor(0, 108 * 128 * 9, 32, A100) == pytest.approx(9)


def filled(value: float, *shape: int) -> np.ndarray:
    """An array that begins where a sector does."""
    memory = np.zeros(int(np.prod(shape)) + 8, np.float32)
    start = -(memory.ctypes.data // 4) % 8
    found = memory[start : start + memory.size - 8].reshape(shape)
    found[:] = value
    return found


def test_one_program_stands_for_all():
    body = """
    ld.param.u64 %rd4, [p1]; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd4, %rd4, %rd5;
    .reg .f32 %f<3>; ld.global.f32 %f1, [%rd1]; ld.global.f32 %f2, [%rd4];
    mul.f32 %f1, %f1, %f2; ex2.approx.f32 %f1, %f1; st.global.f32 [%rd1], %f1;
    """
    x, w = filled(1, 64, 128), filled(3, 128)
    launch = program(WORD_OF_THREAD + body, x, w, threads=128, blocks=64)
    found = sampled.work(launch, sampled.sample(launch), 20, 0)
    assert (x == np.where(np.arange(64) == 32, 8, 1)[:, None]).all()
    assert (found.blocks, found.threads, found.registers) == (64, 128, 20)
    assert (found.fp32, found.special, found.tensor) == (4, 4, 0)
    assert found.sectors == 3 * 128 * 4 // 32
    assert found.dram == 2 * x.nbytes + w.nbytes  # w is read again from the caches


def test_products_of_tensor_cores():
    (mma,) = instructions(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};"
    )
    assert sampled.flops(mma) == 2 * 16 * 8 * 16 and sampled.operands(mma) == 0
    (wgmma,) = instructions(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;"
    )
    assert 4 * sampled.flops(wgmma) == 2 * 64 * 32 * 16
    assert 4 * sampled.operands(wgmma) == 2 * (64 + 32) * 16 / 128


def instructions(text: str):
    registers = ".reg .f32 %f<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;"
    return parse(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{\n"
        f"{registers}\n{text}\n}}\n", "k"
    ).code[:1]  # fmt: skip


def test_each_shape_of_block_comes_before_other_warps():
    small, same, large = Tile(16, 16), Tile(16, 16, num_warps=8), Tile(32, 16)
    assert by_turns([small, Tile(16, 16, num_stages=2), same, large]) == [small, large, same]


# ---- what is committed


def test_the_reasons_of_the_tiles_are_what_was_counted():
    said = reasons(read())
    for table, archs in TABLES.items():
        for arch, rows in archs.items():
            for row in rows:
                told = said.get((table, arch, row.bits, row.limit))
                words = row.why.partition(MARK)[2]
                place = f"{table} {arch} {row}"
                assert words == "; ".join(told or []), place
                assert row.why.endswith("unmeasured") == (told is None), place


def test_the_file_has_the_tiles_of_the_rows_and_others():
    found, here = read(), {tuple(place.key): place for place in places()}
    assert set(found) <= set(here), "a row is gone: python -m tests.ptx.tiles"
    for key, counted in found.items():
        assert counted.entry(here[key].row.tile), f"{key} has another tile now"
        assert all(KNOWN & set(entry) for entry in counted.entries)
        assert counted.ordered(), key


def test_words_take_the_place_of_unmeasured():
    lines = ['    Row(HALF, 64, Tile(1), "fits 64 KiB; unmeasured"),\n']
    text = f"TABLES: dict = {{'t': {{'any': (\n{lines[0]})}}}}\n"
    ((key, constant),) = tile_words.strings(text)
    assert key == ("t", "any", 16, 64)
    told = text.splitlines(keepends=True)
    tile_words.replaced(told, constant, ["sm80 1.0", "sm90 2.0"])
    again = "".join(told)
    ((_, constant),) = tile_words.strings(again)
    assert constant.value == "fits 64 KiB; counted: sm80 1.0; sm90 2.0"
    told = again.splitlines(keepends=True)
    tile_words.replaced(told, constant, ["sm80 3.0"])
    ((_, constant),) = tile_words.strings("".join(told))
    assert constant.value == "fits 64 KiB; counted: sm80 3.0"


def test_a_tile_is_named_by_its_blocks():
    assert named(Tile(64, block_k=32)) == "m 64, k 32; 4 warps, 3 stages"
