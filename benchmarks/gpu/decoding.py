"""Decoding in bf16: a token at batch 1, 8 and 32, every method unmerged."""

import torch

from benchmarks import decode
from benchmarks.record import Record


def run(record: Record, device: torch.device) -> int:
    """Run ``benchmarks.decode`` on the GPU."""
    repeats = decode.measure(15, device, torch.bfloat16)
    record.add(seconds=decode.medians(repeats), repeats=repeats)
    record.finish()
    print(decode.report(decode.medians(repeats)))
    return 0
