"""The trainable sites. Each holds its tensors and the frozen module it modifies, and no maths."""

from .adapter import ParallelAttentionAdapter, SequentialAdapter
from .ffn import (
    LayerAdapter,
    NormAdapter,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialFFNAdapter,
)
from .ffn_block import FFNBlock
from .heads import MultiHeadAdapter, QueryHeads, QuerySlice
from .lora import LoRALinear
from .prefix import PrefixBank
from .prefix_run import PrefixSlice
from .prompt import Prompt

__all__ = [
    "FFNBlock",
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
