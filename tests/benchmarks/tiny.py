"""Shapes small enough for a test."""

from dataclasses import replace

import torch

from benchmarks import shapes
from benchmarks.gpu.kernel_case import Sizes
from benchmarks.subjects import Setting

WIDTHS = {"bart": ("bart-large", 64), "llama": ("llama-3-8b", 64), "t5": ("t5-base", 64),
          "roberta": ("roberta-base", 64)}  # fmt: skip
SETTING = Setting(rows=2, length=24)
CPU = torch.device("cpu")
TINY = Sizes(m=24, k=32, inner=40, batch=1, heads=2, queries=12, dim=16, ranks=(8,), prefixes=(5,))


def shape(family: str) -> shapes.Shape:
    """One layer, 64 wide."""
    name, width = WIDTHS[family]
    return replace(shapes.shrunk(name, 1, width), name=f"tiny-{family}")


def bf16() -> Setting:
    """As on a GPU."""
    return replace(SETTING, dtype=torch.bfloat16)
