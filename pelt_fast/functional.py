"""The public functions, one for each op. Importing them needs torch alone.

Activations may have any leading dims; M is their product. Trainable weights may be fp32 with bf16
or fp16 activations: the weights are cast, never the activation, and their gradients are fp32.
Frozen weights have the activation's dtype. Autocast casts the activations and frozen weights of a
layer, as for ``F.linear``; inside an op it is off.
"""

from pelt_fast.ops.adapter.api import parallel_adapter, sequential_adapter
from pelt_fast.ops.beside.api import ffn_adapter_beside, lora_beside
from pelt_fast.ops.lora.api import lora_linear
from pelt_fast.ops.prefix_attention.api import prefix_attention, routed_prefix_attention
from pelt_fast.ops.routed.api import routed_beside
from pelt_fast.ops.widened_ffn.api import ffn_parallel_adapter

__all__ = [
    "ffn_adapter_beside",
    "ffn_parallel_adapter",
    "lora_beside",
    "lora_linear",
    "parallel_adapter",
    "prefix_attention",
    "routed_beside",
    "routed_prefix_attention",
    "sequential_adapter",
]
