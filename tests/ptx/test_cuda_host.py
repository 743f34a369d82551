"""What the launchers of csrc/cuda launch, recorded: against the numbers that the words at the head
of each source give."""

import ctypes
import struct

import pytest

from .cuda_host import INVALID_VALUE, MISSING, NOT_SUPPORTED, NVCC, Host, original
from .cuda_launch import RankBackward, TailGemm
from .global_memory import GlobalMemory

pytestmark = pytest.mark.skipif(NVCC is None, reason=MISSING)
PLACE = 1 << 32  # pointers that nobody follows here
BF16, F16 = 10, 6  # .elemtype of tensormap.replace, PTX ISA table of its values
SWIZZLE_128 = 3


@pytest.fixture(scope="module")
def backward() -> Host:
    return Host(original("rank_backward"), "sm_80")


@pytest.fixture(scope="module")
def tail() -> Host:
    return Host(original("tail_gemm"), "sm_90a")


def ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---- rank_backward


def rank_backward(host: Host, M: int, N: int, R: int, processors: int = 8, **changed):
    """(error, launches, workspace) of a call whose fields are ``changed``."""
    fields = dict(dy=PLACE, h=2 * PLACE, b=3 * PLACE, dh=4 * PLACE, db=5 * PLACE,
                  d_bias=6 * PLACE, rows=M, width=N, rank=R, stride=N, scale=0.5, is_bf16=True)  # fmt: skip
    workspace = changed.pop("workspace", 7 * PLACE)
    g = RankBackward(**{**fields, **changed})
    host.library.rank_backward_workspace.restype = ctypes.c_int64
    size = host.library.rank_backward_workspace(ctypes.byref(g), processors)
    arguments = ctypes.byref(g), ctypes.c_void_p(workspace), processors
    error, launches = host.call("rank_backward", *arguments, memory=GlobalMemory())
    return error, launches, size


def test_structures_are_as_large_as_those_of_cpp(backward, tail):
    backward.library.size_of_rank_backward.restype = ctypes.c_int64
    tail.library.size_of_tail_gemm.restype = ctypes.c_int64
    assert backward.library.size_of_rank_backward() == ctypes.sizeof(RankBackward)
    assert tail.library.size_of_tail_gemm() == ctypes.sizeof(TailGemm)


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("rank, block, columns, step", [
    (8, 16, 512, 32), (16, 16, 512, 32), (24, 32, 256, 32), (32, 32, 256, 32), (64, 64, 256, 16),
])  # fmt: skip
def test_rank_backward_has_the_tiles_and_the_shared_memory_of_its_budget(
    target, rank, block, columns, step
):
    host = Host(original("rank_backward"), target)
    error, launches, _ = rank_backward(host, M=1000, N=1032, R=rank)
    assert error == 0
    first = launches[0]
    shared = (3 * (step * (2 * columns + 16) + step * (2 * block + 16))
              + columns * (2 * block + 16) + 32 * step * block)  # fmt: skip
    assert (first.threads, first.cluster, first.dynamic) == (256, 1, shared)
    assert f"backwardI13__nv_bfloat16Li{block}E" in first.entry.name
    assert first.entry.target == target and first.grid[0] == ceil(1032, columns)


@pytest.mark.parametrize("empty", [dict(rows=0), dict(width=0), dict(processors=0)], ids=str)
def test_rank_backward_of_nothing_needs_no_workspace(backward, empty):
    """The size is asked for before anything is refused; it is no division by zero."""
    _, launches, size = rank_backward(backward, 1000, 1032, 16, **empty)
    assert size == 0 and not launches


@pytest.mark.parametrize("M, processors", [(1, 8), (33, 8), (1000, 8), (1000, 1), (5000, 132)])
def test_rank_backward_parts_the_rows_among_the_processors(backward, M, processors):
    N, R = 1032, 16
    _, launches, size = rank_backward(backward, M, N, R, processors)
    columns, parts, _ = launches[0].grid
    dh, db, bias, rows = struct.unpack_from("4q", launches[0].parameters, 88)
    assert rows % 32 == 0 and (parts - 1) * rows < M <= parts * rows
    assert columns == 3 and columns * parts < 2 * processors + columns
    # the workspace: sums of dh by columns, of db and d_bias by parts
    assert dh == 7 * PLACE and db == dh + 4 * columns * M * R
    assert bias == db + 4 * parts * N * R and dh + size == bias + 4 * parts * N


def test_rank_backward_adds_each_sum_in_one_launch(backward):
    M, N, R = 1000, 1032, 16
    _, launches, _ = rank_backward(backward, M, N, R)
    columns, parts, _ = launches[0].grid
    sources = struct.unpack_from("3q", launches[0].parameters, 88)
    wanted = zip(sources, (4, 5, 6), (M * R, N * R, N), (columns, parts, parts), strict=True)
    for launch, (source, out, count, terms) in zip(launches[1:], wanted, strict=True):
        assert launch.grid == (ceil(count, 256), 1, 1) and launch.threads == 256
        assert struct.unpack("3qif", launch.parameters) == (
            source, out * PLACE, count, terms, 0.5)  # fmt: skip


def test_rank_backward_without_a_bias_launches_one_kernel_less(backward):
    _, launches, size = rank_backward(backward, 1000, 1032, 16, d_bias=None)
    columns, parts, _ = launches[0].grid
    assert len(launches) == 3 and struct.unpack_from("q", launches[0].parameters, 104) == (0,)
    assert size == 4 * (columns * 1000 * 16 + parts * 1032 * 16)


def test_rank_backward_of_fp16_launches_kernels_of_fp16(backward):
    _, launches, _ = rank_backward(backward, 10, 16, 40, is_bf16=False)
    assert "backwardI6__halfLi64E" in launches[0].entry.name
    assert "add_partsI6__half" in launches[1].entry.name
    assert "add_partsIfE" in launches[2].entry.name


@pytest.mark.parametrize("changed", [
    dict(rows=0), dict(width=0), dict(rank=0), dict(rank=72), dict(rank=12), dict(width=1028),
    dict(stride=1028), dict(stride=1024), dict(dy=PLACE + 2), dict(h=PLACE + 8),
    dict(b=PLACE + 4), dict(workspace=PLACE + 4), dict(processors=0),
    dict(rows=1 << 22, width=8, stride=8, processors=1 << 20),  # more parts than a grid has
], ids=str)  # fmt: skip
def test_rank_backward_refuses_what_its_header_excludes(backward, changed):
    error, launches, _ = rank_backward(backward, 1000, 1032, 16, **changed)
    assert error == INVALID_VALUE and not launches


# ---- tail_gemm


def tail_gemm(host: Host, M: int, K: int, N: int, R: int, cluster=2, processors=4, **changed):
    """(error, launches) of a call whose fields are ``changed``."""
    names = ("a", "w", "s", "u", "bias", "bits", "out")
    fields = {name: PLACE * (n + 1) for n, name in enumerate(names)}
    fields |= dict(rows=M, width=N, depth=K, rank=R, a_stride=K + 8, out_stride=N + 16,
                   keep_scale=2.0, transposed=False, is_bf16=True)  # fmt: skip
    g = TailGemm(**{**fields, **changed})
    return host.call("tail_gemm", ctypes.byref(g), processors, cluster, memory=GlobalMemory())


def maps(parameters: bytes) -> dict[str, dict]:
    """The five tensor maps, by the layout that the machine has agreed on."""
    found = {}
    for n, name in enumerate(("a", "s", "w", "u", "out")):
        packed = parameters[128 * n : 128 * (n + 1)]
        address, rank, kind, interleave, swizzle, fill = struct.unpack_from("<Q5I", packed)
        assert packed[120:] == b"PTXTMAP1" and rank == 2 and interleave == fill == 0
        assert struct.unpack_from("<2I", packed, 48) == (1, 1)
        found[name] = dict(
            address=address // PLACE, kind=kind, swizzle=swizzle,
            box=struct.unpack_from("<2I", packed, 28), sizes=struct.unpack_from("<2I", packed, 68),
            stride=struct.unpack_from("<Q", packed, 88)[0])  # fmt: skip
    return found


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_tail_gemm_describes_its_matrices(tail, cluster, transposed):
    M, K, N, R = 300, 200, 520, 40
    changed = dict(transposed=transposed, is_bf16=not transposed)
    error, (launch,) = tail_gemm(tail, M, K, N, R, cluster, **changed)
    kind = F16 if transposed else BF16
    # a box is 64 elements wide, the 128 bytes of the swizzle; rows of a tile, of a half of it, of w
    share = 64 if transposed else 256 // cluster
    wanted = {
        "a": (1, (K, M), K + 8, 128), "s": (3, (R, M), R, 128), "out": (7, (N, M), N + 16, 64),
        "w": (2, (N, K) if transposed else (K, N), N if transposed else K, share),
        "u": (4, (N, R) if transposed else (R, N), N if transposed else R, share),
    }  # fmt: skip
    assert error == 0
    assert maps(launch.parameters) == {
        name: dict(address=at, kind=kind, swizzle=SWIZZLE_128, box=(64, rows), sizes=sizes,
                   stride=2 * stride)
        for name, (at, sizes, stride, rows) in wanted.items()}  # fmt: skip


@pytest.mark.parametrize("cluster, processors, blocks", [
    (1, 2, 2), (1, 132, 9), (2, 5, 4), (2, 132, 12),
])  # fmt: skip
def test_tail_gemm_launches_whole_clusters_on_the_processors(tail, cluster, processors, blocks):
    """300 x 520 are 3 x 3 tiles of 128 x 256; in clusters of two, one below the other, 4 x 3."""
    error, (launch,) = tail_gemm(tail, 300, 200, 520, 72, cluster, processors)
    assert error == 0 and launch.grid == (blocks, 1, 1)
    assert (launch.threads, launch.cluster) == (384, cluster)
    assert launch.dynamic == 4 * (16 + 32) * 1024 + 32 * 1024 + 1024 + 128
    problem = struct.unpack_from("2qf4x2q5i", launch.parameters, 640)
    tiles = (3 if cluster == 1 else 4, 3)
    assert problem == (5 * PLACE, 6 * PLACE, 2.0, 300, 520, 72, 2, 4, *tiles)


@pytest.mark.parametrize("is_bf16", [True, False])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_tail_gemm_launches_the_kernel_of_its_dtype_cluster_and_layout(
    tail, is_bf16, cluster, transposed
):
    changed = dict(is_bf16=is_bf16, transposed=transposed)
    _, (launch,) = tail_gemm(tail, 8, 8, 8, 8, cluster, **changed)
    dtype = "13__nv_bfloat16" if is_bf16 else "6__half"
    assert f"kernelI{dtype}Li{cluster}ELb{int(transposed)}E" in launch.entry.name


@pytest.mark.parametrize("changed", [
    dict(rows=0), dict(width=0), dict(depth=0), dict(rank=0), dict(rank=1032), dict(rank=12),
    dict(depth=196), dict(width=516), dict(a_stride=192), dict(a_stride=204),
    dict(out_stride=512), dict(out_stride=524), dict(a=PLACE + 8), dict(w=PLACE + 8),
    dict(s=PLACE + 8), dict(u=PLACE + 8), dict(out=PLACE + 8), dict(cluster=0), dict(cluster=3),
    dict(processors=1), dict(rows=(1 << 31) - 8), dict(a_stride=1 << 40),
], ids=str)  # fmt: skip
def test_tail_gemm_refuses_what_its_header_excludes(tail, changed):
    error, launches = tail_gemm(tail, 300, 200, 520, 40, **changed)
    assert error == INVALID_VALUE and not launches


def test_tail_gemm_refuses_another_gpu():
    host = Host(original("tail_gemm"), "sm_90a", major=10)
    error, launches = tail_gemm(host, 300, 200, 520, 40)
    assert error == NOT_SUPPORTED and not launches
