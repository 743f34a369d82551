"""Attention with dropout on its weights, on a CPU: milliseconds forward and backward.

    python -m benchmarks.attention_dropout [--length 30]

Prefix attention by what a CPU runs, and by its specification; and
torch's attention with dropout and no prefix, the floor of a frozen model. Half of the rows are
padded. The three take turns.
"""

import argparse
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

import pelt_fast
from pelt_fast import functional
from pelt_fast.ops.common import native

from .common import table
from .timing import rounds

P, REPEATS = 0.1, 9
SIZES = [(32, 12, 64, 32), (16, 12, 128, 32), (8, 12, 256, 64)]  # batch, heads, tokens, head dim
HEADER = ["batch, heads, tokens, head dim", "ours", "specification", "torch, no prefix"]


def measure(size: tuple[int, ...], length: int) -> list[str]:
    """The line of one size."""
    batch, heads, tokens, dim = size
    q, k, v = (
        torch.randn(batch, tokens, heads, dim).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    prefix = [torch.randn(heads, length, dim, requires_grad=True) for _ in range(2)]
    seen = torch.ones(batch, 1, 1, tokens, dtype=torch.bool)
    seen[::2, ..., tokens // 2 :] = False
    mask = seen.expand(batch, 1, tokens, tokens)

    def with_prefix(_: int) -> None:
        o = functional.prefix_attention(q, k, v, *prefix, attn_mask=mask, dropout_p=P)
        _backward(o, [q, k, v, *prefix])

    def specified(i: int) -> None:
        with pelt_fast.backend("reference"):
            with_prefix(i)

    def without(_: int) -> None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=P)
        _backward(o, [q, k, v])

    steps = {"ours": with_prefix, "specification": specified, "torch": without}
    times = rounds(steps, REPEATS)
    cells = [f"{1e3 * median(times[name]):.0f}" for name in steps]
    return [", ".join(map(str, size)), *cells]


def _backward(o: Tensor, inputs: list[Tensor]) -> None:
    torch.autograd.grad(o, inputs, torch.ones_like(o))


def main() -> None:
    """Print the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=30, help="of the prefix, 1 or more")
    options = parser.parse_args()
    if options.length < 1:
        parser.error(f"--length must be at least 1, got {options.length}")
    reason = native.why_missing()
    if reason is not None:
        parser.error(f"the C++ ops are missing: {reason}")
    print(table(HEADER, [measure(size, options.length) for size in SIZES]))


if __name__ == "__main__":
    main()
