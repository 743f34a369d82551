"""Broken copies of csrc/cuda: each has one fault that a GPU might not show."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from csrc import nvcc

from .cuda_cases import Backward, Tail, differs
from .cuda_host import Compiled, compiled
from .cuda_launch import LaunchError
from .errors import MachineError
from .machine import EARLY, LATE, Mode

ORDERS = (EARLY, LATE, Mode(shuffled=True, seed=1), Mode(late=True, shuffled=True, seed=2))
BACKWARD = Backward(150, 520, 16, processors=1)
PARTS = Backward(150, 264, 16, processors=2)
TAIL = Tail(200, 328, 264, 24)
ALONE = Tail(200, 328, 264, 24, cluster=1)
TURNED = Tail(200, 328, 264, 24, transposed=True)
WHOLE = Tail(256, 328, 512, 24)  # blocks that end about together: either may be the first

# A mutant is compiled for its own case alone.
_ONLY = {
    "rank_backward": (
        ("return launch<T, 32>(g, workspace, grid, stream);", "return cudaErrorNotSupported;"),
        ("return launch<T, 64>(g, workspace, grid, stream);", "return cudaErrorNotSupported;"),
        (": by_rank<__half>(g, floats, grid, stream);", ": cudaErrorNotSupported;"),
    ),
    "tail_gemm": (
        ("return cluster == 1 ? by_layout<__half, 1>(g, maps, problem, processors, stream)\n"
         "                      : by_layout<__half, 2>(g, maps, problem, processors, stream);",
         "return cudaErrorNotSupported;"),
    ),
}  # fmt: skip
_ONLY_CLUSTER = {
    1: (": by_layout<__nv_bfloat16, 2>(g, maps, problem, processors, stream);",
        ": cudaErrorNotSupported;"),
    2: ("cluster == 1 ? by_layout<__nv_bfloat16, 1>(g, maps, problem, processors, stream)",
        "cluster == 1 ? cudaErrorNotSupported"),
}  # fmt: skip
_ONLY_LAYOUT = {
    False: ("g.transposed ? launch<T, Cluster, true>(maps, problem, processors, stream)",
            "g.transposed ? cudaErrorNotSupported"),
    True: (": launch<T, Cluster, false>(maps, problem, processors, stream);",
           ": cudaErrorNotSupported;"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in a file, the ``which``-th time it is there; ``by`` is what shows
    it: a kind of MachineError, "budget" (a wrong number) or "order" (early and late differ)."""

    name: str
    case: Backward | Tail
    file: str
    old: str
    new: str
    by: str
    which: int = 0

    @property
    def source(self) -> str:
        return "rank_backward" if isinstance(self.case, Backward) else "tail_gemm"

    def compile(self, folder: Path) -> Compiled:
        """The broken copy, compiled in a folder."""
        copy = folder / "cuda"
        shutil.copytree(nvcc.CUDA, copy)
        _change(copy / f"{self.source}.cu", self._only())
        _change(copy / self.file, ((self.old, self.new),), self.which)
        target = self.case.target if isinstance(self.case, Backward) else "sm_90a"
        return compiled(copy / f"{self.source}.cu", folder / "out", (target.removeprefix("sm_"),))

    def _only(self) -> tuple[tuple[str, str], ...]:
        if isinstance(self.case, Backward):
            return _ONLY["rank_backward"]
        narrow = _ONLY_CLUSTER[self.case.cluster], _ONLY_LAYOUT[self.case.transposed]
        return (*_ONLY["tail_gemm"], *narrow)


def _change(path: Path, changes: tuple[tuple[str, str], ...], which: int = 0) -> None:
    text = path.read_text()
    for old, new in changes:
        parts = text.split(old)
        if len(parts) < which + 2:
            raise ValueError(f"{path.name} has no {old!r} number {which}")
        text = old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])
    path.write_text(text)


def shown_by(case: Backward | Tail, code: Compiled) -> str:
    """What shows that a kernel is broken; empty where nothing does."""
    first = None
    for mode in ORDERS:
        try:
            found = case.run(mode, code)
            case.check(found)
        except (MachineError, LaunchError) as error:
            return f"{type(error).__name__}: {error}"
        except AssertionError as error:
            return f"budget: {error}"
        if first is not None and differs(first, found):
            return "order: the bits depend on it"
        first = found
    return ""


REMOVED = "/* removed */"
BACK, GEMM = "rank_backward.cu", "tail_gemm.cu"
MUTANTS = [
    # rank_backward: copies in stages
    Mutant("waits for one stage less", BACKWARD, BACK,
           "wait<kStages - 2>();", "wait<kStages - 1>();", "Race"),
    Mutant("no barrier before a stage is read", BACKWARD, BACK,
           "__syncthreads();  // this stage", "// this stage", "Race"),
    Mutant("no barrier before the sums are added", BACKWARD, BACK,
           "__syncthreads();\n    for", "for", "Race"),
    Mutant("copies of a step are not committed", BACKWARD, BACK, "commit();", REMOVED, "Race", 1),
    Mutant("the next stage is the one that is read", BACKWARD, BACK,
           "(stage + kStages - 1) % kStages", "(stage + kStages) % kStages", "Race"),
    Mutant("a step further is fetched", BACKWARD, BACK,
           "row + (kStages - 1) * S::kStep", "row + kStages * S::kStep", "budget"),
    Mutant("copies what lies outside", BACKWARD, "mma.cuh",
           '"r"(inside ? 16 : 0)', '"r"(16)', "budget"),
    Mutant("columns beyond the width are copied", BACKWARD, BACK,
           "row + r < end && column + c < g.width", "row + r < end", "BadAccess"),
    Mutant("a part goes on to the last row", PARTS, BACK,
           "end = min(first + parts.rows, g.rows)", "end = g.rows", "budget"),
    # fragments
    Mutant("halves of the right operand are swapped", BACKWARD, BACK,
           "right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]",
           "right[j / 2][j % 2 * 2 + 1], right[j / 2][j % 2 * 2]", "budget"),
    Mutant("matrices of the left operand are swapped", BACKWARD, BACK,
           "lane % 8 + lane / 16 * 8) * kDyRow + own + 16 * i +\n"
           "                                   lane / 8 % 2 * 8",
           "lane % 8 + lane / 8 % 2 * 8) * kDyRow + own + 16 * i +\n"
           "                                   lane / 16 * 8", "budget"),
    Mutant("b is not turned", BACKWARD, BACK,
           "load4_transposed(right,", "load4(right,", "budget"),
    Mutant("sums are read where they were not written", BACKWARD, BACK,
           "S::kStep * Rank + place_of<Rank>(i)", "S::kStep * Rank + i", "budget"),
    Mutant("the sums of one warp are left out", BACKWARD, BACK,
           "for (int w = 0; w < kWarps; ++w)", "for (int w = 1; w < kWarps; ++w)", "budget"),
    # its host side
    Mutant("one part less is added", PARTS, BACK,
           "g.width * g.rank, grid.parts", "g.width * g.rank, grid.parts - 1", "budget"),
    Mutant("shared memory for one stage less", BACKWARD, BACK,
           "2 * (kStages * (kDy + kH) + kB)", "2 * ((kStages - 1) * (kDy + kH) + kB)", "BadAccess"),
    # tail_gemm: barriers of the ring
    Mutant("does not wait for the copies of a step", TAIL, GEMM,
           "wait_for(ring.full + turn.stage, turn.parity);", REMOVED, "BadAccess", 1),
    Mutant("the copying thread waits for the other parity", ALONE, GEMM,
           "turn.parity ^ 1", "turn.parity", "Deadlock"),
    Mutant("the copying thread does not wait", ALONE, GEMM,
           "wait_for(ring.empty + turn.stage, turn.parity ^ 1);", REMOVED, "Race"),
    Mutant("waits for too few releases", TAIL, GEMM,
           "Cluster * kConsumers * 4", "kConsumers * 4", "Deadlock"),
    Mutant("waits for too many releases", TAIL, GEMM,
           "Cluster * kConsumers * 4", "Cluster * kConsumers * 8", "Deadlock"),
    Mutant("expects too few bytes", TAIL, GEMM,
           "expect(full, kABytes + kBBytes)", "expect(full, kABytes + kBBytes / 2)", "Race"),
    Mutant("expects too many bytes", ALONE, GEMM,
           "expect(full, kABytes + kBBytes)", "expect(full, kABytes + 2 * kBBytes)", "Deadlock"),
    Mutant("the parity does not turn", ALONE, "ring.cuh",
           "stage = 0, parity ^= 1", "stage = 0", "Deadlock"),
    Mutant("the last stage of a tile is not released", TAIL, GEMM,
           "release<Cluster>(ring, before);\n    store", "store", "Deadlock"),
    # clusters
    Mutant("copies go to the own block alone", TAIL, GEMM,
           "(1 << Cluster) - 1", "1", "Deadlock"),
    Mutant("both blocks copy the same half", TAIL, GEMM,
           "first = rank * kShare", "first = 0", "BadAccess"),
    Mutant("releases reach the own block alone", TAIL, "ring.cuh",
           "arrive(ring.empty + stage, threadIdx.x % 32)", "arrive(ring.empty + stage, 0)",
           "Deadlock"),
    Mutant("the cluster does not meet before it copies", TAIL, GEMM,
           "if constexpr (Cluster > 1) meet_cluster();", REMOVED, "Race"),
    Mutant("barriers are not shown to the other block's copies", TAIL, GEMM,
           "publish_barriers();", REMOVED, "Race"),
    # products
    Mutant("waits for too few products", TAIL, GEMM,
           "wait_products<1>();", "wait_products<2>();", "Race"),
    Mutant("does not wait for the last products", TAIL, GEMM,
           "wait_products<0>();\n    release<Cluster>(ring, before);",
           "release<Cluster>(ring, before);", "Race"),
    Mutant("products are not committed", TAIL, GEMM, "commit_products();", REMOVED, "Race"),
    Mutant("another swizzle of the operands", TAIL, "hopper.cuh",
           "kSwizzle128 = 1", "kSwizzle128 = 2", "BadAccess"),
    Mutant("matrices are copied without a swizzle", TAIL, "tensor_map.h",
           "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_NONE", "budget"),
    Mutant("half a step along K", TAIL, GEMM, "further(a, k * 32)", "further(a, k * 16)", "budget"),
    Mutant("the leading offset of the other layout", TURNED, GEMM,
           "Transposed ? kStep * 128 : 16", "16", "BadAccess"),
    Mutant("a step along N for one along K", TURNED, GEMM,
           "k * (Transposed ? 2048 : 32)", "k * 32", "BadAccess"),
    Mutant("the tail is left out", TAIL, GEMM,
           "static_cast<int>((g.rank + kStep - 1) / kStep)", "0", "budget"),
    Mutant("half of the tail is left out", TAIL, GEMM, "kStep / 32>(c", "kStep / 64>(c", "budget"),
    Mutant("registers are not fenced before products", TAIL, GEMM,
           "begin_products();\n#pragma", "#pragma", "Race"),
    Mutant("the mask does not wait for the tail", TAIL, GEMM,
           "wait_products<0>();\n      release<Cluster>(ring, turn.stage);\n    }\n"
           "    // said once more, or ptxas runs all products one by one (C7515) for the mask's sake\n"
           "    wait_products<0>();", "release<Cluster>(ring, turn.stage);\n    }", "Race"),
    Mutant("both warpgroups multiply the same rows", TAIL, GEMM,
           "stage * kABytes + group * kHalf * 128", "stage * kABytes", "budget"),
    # the epilogue
    Mutant("no fence before the bulk store", TAIL, GEMM, "publish_shared();", REMOVED, "Race"),
    Mutant("does not wait until a store has read", TAIL, GEMM,
           "if (thread == 0) wait_stores_read();", REMOVED, "Race"),
    Mutant("stores are not committed", TAIL, GEMM, "commit_stores();", REMOVED, "Race"),
    Mutant("another swizzle of the result", TAIL, GEMM,
           "(j % 8) ^ (row % 8)", "(j % 8) ^ (row % 4)", "budget"),
    Mutant("no meeting before the bulk store", TAIL, GEMM,
           "publish_shared();\n    meet(1 + group, 128);", "publish_shared();", "Race"),
    Mutant("no meeting before the boxes are written", TAIL, GEMM,
           "wait_stores_read();\n    meet(1 + group, 128);", "wait_stores_read();", "Race"),
    Mutant("the warpgroups meet under one name", TAIL, GEMM, "meet(1 + group, 128)",
           "meet(1, 128)", "BadBarrier"),
    Mutant("bits of the next element", TAIL, GEMM, ">> 2 * lane", ">> (2 * lane + 1)", "budget"),
    Mutant("bits of another thread's columns", TAIL, GEMM, "j / 8, 4)", "j / 8 ^ 1, 4)", "budget"),
    Mutant("bits beyond the width are read", TAIL, GEMM, "? width - column : 0", "? 8 : 0",
           "BadAccess"),
    Mutant("bits are read at once from anywhere", TAIL, GEMM,
           "reinterpret_cast<int64_t>(g.bits)) % 8 == 0", "reinterpret_cast<int64_t>(g.bits)) >= 0",
           "BadAccess"),
    Mutant("two numbers of a fragment are swapped", TAIL, GEMM,
           "pair(sum[0] + left, sum[1] + right, bias)", "pair(sum[1] + left, sum[0] + right, bias)",
           "budget"),
    Mutant("both boxes go to the same columns", TAIL, GEMM,
           "first + 128 * half + kBox, y", "first + 128 * half, y", "budget"),
    Mutant("ends before its stores have read", ALONE, GEMM, "wait_stores();", ";", "BadBarrier"),
    Mutant("a block ends before others arrive at it", WHOLE, GEMM,
           "__syncwarp();\n    meet_cluster();", "__syncwarp();", "BadBarrier"),
    Mutant("blocks of a cluster take the same rows", TAIL, GEMM,
           "* Cluster + rank, within", "* Cluster, within", "budget"),
    # its host side
    Mutant("the last step of K is left out", TAIL, GEMM,
           "(g.depth + kStep - 1) / kStep", "g.depth / kStep", "budget"),
    Mutant("shared memory is not asked for", TAIL, GEMM,
           "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)",
           "cudaSuccess", "LaunchError"),
    Mutant("no whole clusters", Tail(200, 328, 264, 24, processors=3), GEMM,
           "processors / Cluster * Cluster", "processors", "LaunchError"),
    Mutant("a tile of columns less", TAIL, GEMM,
           "(g.width + kTileN - 1) / kTileN)}", "g.width / kTileN)}", "budget"),
    Mutant("boxes of w for another cluster", TAIL, GEMM,
           "turned ? kStep : kTileN / cluster", "turned ? kStep : kTileN / 2 / cluster", "Deadlock"),
]  # fmt: skip
