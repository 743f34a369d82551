"""Cases of every op and the error budget, for tests, ``pelt-fast check`` and the benchmarks.

A case holds an input, our call, and the same function as a plain PyTorch expression. Autograd runs
the expression in fp64: this is the oracle. It shares no line with the references or the backends.
The expression in the case's own dtype sets the budget: an op may be at most twice as far from the
oracle as PyTorch is, plus a rounding band.

``pelt_fast.testing.models`` has small random models. Import it by name: it needs transformers, and
this package does not.
"""

from .case import Case, Tensors, run
from .catalogue import cases
from .judging import doubled, has_its_own_mask, judge
from .verdict import ROUNDING_BAND, Verdict, compare

__all__ = [
    "ROUNDING_BAND", "Case", "Tensors", "Verdict", "cases", "compare", "doubled",
    "has_its_own_mask", "judge", "run",
]  # fmt: skip
