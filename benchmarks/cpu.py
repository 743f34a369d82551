"""The layers that the C++ ops are for, on a CPU, each compared with the frozen layer and all peers.

python -m benchmarks.cpu [--record] [--repeats 15]    about two minutes on two cores

LoRA on 4096 x 1024 to 1024, r=16, fp32 and bf16 with fp32 factors; adapters on 4096 x 768, R=64;
prefix attention B8 H12 S256 D64, P=30. The part is called layer-cpu; ``targets`` judges it.
"""

import argparse
import dataclasses

import torch

from . import layer, peers
from .bench import RUNS
from .record import Record
from .shapes import Shape
from .subjects import Setting

PART = "layer-cpu"
SQUARE = Shape("square", "bart", 1024, 1024, 16, 64, 1, 1000)
BASE = Shape("base", "bart", 768, 3072, 12, 64, 1, 1000)
NAMES = ("frozen", "pelt_fast", "plain", "compile", "peft", "concatenation")
FP32 = Setting(rows=16, length=256)  # 4096 tokens
BF16 = dataclasses.replace(FP32, dtype=torch.bfloat16)
CASES = [  # subject, shape, size, p, setting
    *(("lora", SQUARE, 16, p, setting) for setting in (FP32, BF16) for p in (0.0, 0.1)),
    ("sequential", BASE, 64, 0.1, FP32),
    ("parallel", BASE, 64, 0.1, FP32),
    *((name, BASE, 30, 0.0, dataclasses.replace(FP32, rows=8))
      for name in ("prefix", "prefix-causal")),
]  # fmt: skip


def run(record: Record, repeats: int) -> None:
    """Measure every case."""
    for name, shape, size, p, setting in CASES:
        about = dict(method=name, model=shape.name, size=size, p=p)
        for entry in layer.measure(name, shape, size, p, setting, peers.chosen(NAMES), repeats):
            dtype = str(setting.dtype).removeprefix("torch.")
            record.add(**about, **entry | dict(layer=f"{entry['layer']}, {dtype}", dtype=dtype))
        torch.compiler.reset()
    record.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        record = Record(PART, None if options.record else RUNS)
    except ValueError as error:
        parser.error(str(error))
    run(record, options.repeats)
    print(layer.report(record.entries))
    print(f"wrote {record.path}")


if __name__ == "__main__":
    main()
