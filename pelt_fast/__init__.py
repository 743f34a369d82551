"""pelt_fast: parameter-efficient fine-tuning at the cost of the frozen model."""

from pelt_fast import functional
from pelt_fast.ops.library import backend

__version__ = "0.1.0"
__all__ = ["backend", "functional"]
