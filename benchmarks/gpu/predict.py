"""What the targets should take on an H200, from bytes and flops alone: no GPU is asked.

    python -m benchmarks.gpu.predict            prints the tables
    python -m benchmarks.gpu.predict --write    also rewrites docs/performance.md

Rates are those the project plans with: 4.3 TB/s, 790 TFLOP/s in bf16. A pass is counted as the
kernels' docstrings count it; workspaces of two-stage reductions count as if they left the L2 cache.
Launches, tails of waves and the integer work of the dropout mask are not in the bytes: the mask's
column assumes one draw (60 integer operations) for 8 elements at 64 a clock and processor.
"""

import argparse
from dataclasses import dataclass

from benchmarks.common import REPOSITORY, table
from pelt_fast.kernels import config
from pelt_fast.kernels.config import HALF

BYTES_A_SECOND, FLOPS_A_SECOND = 4.3e12, 790e12
INTEGERS_A_SECOND = 132 * 64 * 1.755e9
DRAW = 60 / 8
PAGE = REPOSITORY / "docs" / "performance.md"
E = 2  # bytes of a bf16 element


@dataclass(frozen=True)
class Prediction:
    """One target: the frozen layer's milliseconds, what ours adds, and the wanted ratio."""

    name: str
    frozen: float
    added: float
    mask: float
    target: float

    @property
    def ratio(self) -> float:
        """Ours to the frozen layer."""
        return (self.frozen + self.added + self.mask) / self.frozen


def moved(elements: float, of: int = E) -> float:
    """Milliseconds to move elements."""
    return 1e3 * elements * of / BYTES_A_SECOND


def computed(flops: float) -> float:
    """Milliseconds of tensor-core flops."""
    return 1e3 * flops / FLOPS_A_SECOND


def drawn(elements: float) -> float:
    """Milliseconds to draw a mask."""
    return 1e3 * elements * DRAW / INTEGERS_A_SECOND


def block_n(kernel: str, size: int) -> int:
    """BLOCK_N of the sm90 row: what decides about the workspace."""
    rows = [row for arch in ("sm90", "any") for row in config.rows(kernel, arch)]
    return next(r.tile.block_n for r in rows if r.bits == HALF and size <= r.limit)


def lora(p: float, tail: bool, target: float, M=8192, K=4096, N=4096, R=16) -> Prediction:
    """x for S; y twice; dy for dS, dB; x for dA; dx twice; the workspace of dS twice."""
    frozen = computed(4 * M * K * N)
    passes = M * K + M * N + M * K + (0 if tail else 2 * M * N + 2 * M * K)
    workspace = 2 * M * R * N / block_n("rank_up_bwd", R)
    added = moved(passes) + moved(workspace, 4)
    mask = drawn(2 * M * K) + moved(3 * M * K / 8, 1) if p else 0.0
    plan = "tail" if tail else "accumulate"
    return Prediction(f"LoRA linear {K} R={R} p={p}, {plan}", frozen, added, mask, target)


def widened_ffn(K: int, F: int, M=8192, R=512) -> Prediction:
    """Three GEMMs of R more each way; activations of F + R; both projections packed."""
    frozen = computed(8 * M * K * F) + moved(2 * M * F + 3 * M * F)
    added = computed(12 * M * K * R) + moved(2 * M * R + 3 * M * R)
    ratio = 1 + 1.5 * R / F
    return Prediction(f"widened FFN {K}/{F} R={R}", frozen, added, 0.0, 1.05 * ratio)


def prefix(causal: bool, B=16, H=16, S=1024, D=64, P=30) -> Prediction:
    """q, o_c, o forward; q, do, o, dq, dq backward; the context at 60 % of the GEMM rate forward,
    50 % backward."""
    rows = B * H * S
    flops = 4 * rows * S * D * (0.5 if causal else 1)
    frozen = computed(flops) / 0.6 + computed(2.5 * flops) / 0.5
    added = moved(8 * rows * D) + computed(14 * rows * config.padded(P) * D)
    name = f"prefix attention B{B} H{H} S{S} D{D} P={P}{' causal' if causal else ''}"
    return Prediction(name, frozen, added, 0.0, 1.15)


def predictions() -> list[Prediction]:
    """The targets, in the issue's order."""
    return [
        lora(0.0, False, 1.20), lora(0.0, True, 1.20), lora(0.1, False, 1.30),
        lora(0.1, True, 1.30), widened_ffn(4096, 14336), widened_ffn(1024, 4096),
        prefix(False), prefix(True),
    ]  # fmt: skip


HEADER = ["layer, forward + backward", "frozen, ms", "added, ms", "mask, ms", "ratio", "target"]


def page() -> str:
    """docs/performance.md."""
    rows = [
        [p.name, *(f"{ms:.3f}" for ms in (p.frozen, p.added, p.mask)), f"{p.ratio:.2f}",
         f"{p.target:.2f}"]
        for p in predictions()
    ]  # fmt: skip
    rules = " ".join(__doc__.split("\n\n")[2].split())
    return f"""# Predicted on an H200

Predictions, not measurements: no GPU has run these kernels. They are here to be checked by
`make gpu PART=4`. Written by `python -m benchmarks.gpu.predict --write`.

{table(HEADER, rows)}

{rules}

The context attention's own rate (60 % of the GEMM's forward, 50 % backward) is assumed, and decides
the last two rows: a slower context makes the prefix cheaper beside it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite docs/performance.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    print(page())


if __name__ == "__main__":
    main()
