"""The trainable sites: each holds its tensors and the frozen module it modifies, and no maths."""

from .adapter import ParallelAttentionAdapter, SequentialAdapter
from .ffn import (
    FrozenFFN,
    LayerAdapter,
    NormAdapter,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialFFNAdapter,
)
from .heads import MultiHeadAdapter, QueryHeads, QuerySlice
from .lora import LoRALinear
from .prefix import PrefixBank, PrefixSlice
from .prompt import Prompt

__all__ = [
    "FrozenFFN",
    "LayerAdapter",
    "LoRALinear",
    "MultiHeadAdapter",
    "NormAdapter",
    "ParallelAttentionAdapter",
    "ParallelFFNAdapter",
    "PrefixBank",
    "PrefixSlice",
    "Prompt",
    "QueryHeads",
    "QuerySlice",
    "ResidualFFNAdapter",
    "SequentialAdapter",
    "SequentialFFNAdapter",
]
