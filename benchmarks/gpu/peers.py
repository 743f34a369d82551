"""Layers in bf16, compared with every peer: torch.compile and FlexAttention too."""

from dataclasses import replace

import torch

from benchmarks import layer
from benchmarks.record import Record
from benchmarks.subjects import Setting

SETTING = Setting(rows=8, length=1024, dtype=torch.bfloat16, device="cuda")
PLANS = (
    layer.Plan(("lora",), ("bart-large", "llama-3-8b"), (16,), setting=SETTING),
    layer.Plan(("ffn",), ("bart-large", "llama-3-8b"), (512,), (0.0, 0.1), setting=SETTING),
    layer.Plan(("prefix", "prefix-causal", "prefix-padded"), ("bart-large", "llama-3-8b"), (30,),
               setting=SETTING),
    layer.Plan(("qkv", "parallel", "sequential"), ("bart-large", "llama-3-8b"), (16, 64),
               setting=SETTING),
    layer.Plan(setting=SETTING),
)  # fmt: skip


def run(record: Record, device: torch.device, plans: tuple[layer.Plan, ...] = PLANS) -> int:
    """Run the most important first; list the rest if the time is over."""
    for plan in plans:
        setting = replace(plan.setting, device=device.type)
        layer.run(replace(plan, setting=setting), record, progress=False)
    print(layer.report(record.entries))
    return 0
