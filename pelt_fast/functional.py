"""The public functions, one for each op. Importing them needs torch alone.

Activations may have any leading dims; M is their product. Trainable weights may be fp32 beside bf16
or fp16 activations: they are cast, never the activation, and their gradients come back in fp32.
Frozen weights have the activation's dtype. Under autocast the activations and frozen weights of a
layer follow it, as ``F.linear``'s do; inside an op it is off.
"""

from pelt_fast.ops.adapter.api import parallel_adapter, sequential_adapter
from pelt_fast.ops.lora.api import lora_linear
from pelt_fast.ops.prefix_attention.api import prefix_attention
from pelt_fast.ops.widened_ffn.api import ffn_parallel_adapter

__all__ = [
    "ffn_parallel_adapter",
    "lora_linear",
    "parallel_adapter",
    "prefix_attention",
    "sequential_adapter",
]
