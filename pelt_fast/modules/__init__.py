"""The trainable sites: each holds its tensors and the frozen slot it modifies, and no maths."""

from .adapter import SequentialAdapter
from .ffn import FrozenFFN, ParallelFFNAdapter, SequentialFFNAdapter
from .lora import LoRALinear
from .prefix import PrefixBank, PrefixSlice

__all__ = [
    "FrozenFFN",
    "LoRALinear",
    "ParallelFFNAdapter",
    "PrefixBank",
    "PrefixSlice",
    "SequentialAdapter",
    "SequentialFFNAdapter",
]
