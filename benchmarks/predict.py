"""Predicted times of layers on a GPU: counted bytes and flops, divided by its rates.

    pelt-fast bench predict [--device h200] [--method lora ffn prefix] [--record]

Each operation takes the longest of three: its bytes (weights too) at the memory's rate, its flops
at the tensor cores', and the dropout masks it draws at the integer units' (one draw, 60 operations,
for 8 elements). A layer is the sum of its operations, forward and backward. Rates are nine tenths
of a device's memory bandwidth and eight tenths of its dense bf16 peak, which good kernels reach;
attention runs at 60 % of a GEMM's forward and 50 % backward. Launches, tails of waves and data that
stays in the L2 cache are not counted.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from . import traffic
from .bytes_moved import Counter, Operation
from .common import table
from .record import Record

OPERATIONS_A_DRAW, ELEMENTS_A_DRAW = 60, 8
ATTENTION_FORWARD, ATTENTION_BACKWARD = 0.6, 0.5
MEMORY_SHARE, COMPUTE_SHARE = 0.9, 0.8


@dataclass(frozen=True)
class Device:
    """A data sheet: bytes a second, dense bf16 flops a second, 32-bit integer operations a
    second."""

    name: str
    bandwidth: float
    peak: float
    integers: float


def _device(name: str, tb_s: float, tflop_s: float, processors: int, ghz: float) -> Device:
    return Device(name, tb_s * 1e12, tflop_s * 1e12, processors * 64 * ghz * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _device("h200", 4.8, 989, 132, 1.755),
        _device("h100", 3.35, 989, 132, 1.755),
        _device("a100", 2.039, 312, 108, 1.41),
        _device("b200", 8.0, 2250, 148, 1.85),
        _device("l40s", 0.864, 362, 142, 2.52),
        _device("rtx4090", 1.008, 165, 128, 2.52),
        _device("mi300x", 5.3, 1307, 304, 2.1),
    )
}

TARGETS = dict(batch=16, heads=16)  # the attention of the targets
CASES: dict[str, Callable] = {
    "lora": traffic.CASES["lora"],
    "adapter": traffic.CASES["adapter"],
    "ffn": lambda: [traffic.ffn(0.0), traffic.ffn(0.0, 1024, 4096), traffic.ffn(0.1, 1024, 4096)],
    "prefix": lambda: [traffic.prefix(causal, **TARGETS) for causal in (False, True)],
}


def device(name: str) -> Device:
    """The device called ``name``; ValueError lists those there are."""
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: choose {', '.join(DEVICES)}")
    return DEVICES[name]


def seconds(operation: Operation, device: Device) -> float:
    """The longest of the times for its bytes, its flops and its draws."""
    share = COMPUTE_SHARE
    if "attention" in operation.name:
        share *= ATTENTION_BACKWARD if "backward" in operation.name else ATTENTION_FORWARD
    return max(
        (operation.moved + operation.weights) / (MEMORY_SHARE * device.bandwidth),
        operation.flops / (share * device.peak),
        operation.drawn * OPERATIONS_A_DRAW / ELEMENTS_A_DRAW / device.integers,
    )


def total(counters: tuple[Counter, ...], device: Device) -> float:
    """Seconds of everything counted."""
    return sum(seconds(operation, device) for c in counters for operation in c.rows)


def run(record: Record, on: Device, methods: list[str] | None = None) -> list[dict]:
    """Predict every provider that a GPU would run; the entries."""
    for case in traffic.cases(methods, CASES):
        floor = None
        for name, (inputs, function) in case.providers.items():
            if name == "plan":  # a CPU's
                continue
            counters = traffic.count(inputs, function, traffic.parameters_of(function))
            taken = total(counters, on)
            floor = taken if name == "frozen" else floor
            record.add(
                device=on.name, layer=case.subject, provider=name, seconds=taken,
                ratio=None if floor is None else taken / floor,
                bytes=sum(c.bytes for c in counters),
                flops=sum(o.flops for c in counters for o in c.rows),
            )  # fmt: skip
    record.finish(rates=asdict(on))
    return record.entries


HEADER = ["layer, forward + backward", "provider", "predicted, ms", "to frozen", "GB", "TFLOP"]


def report(entries: list[dict]) -> str:
    """The table."""
    lines = [
        [e["layer"], e["provider"], f"{1e3 * e['seconds']:.3f}",
         "" if e["ratio"] is None else f"{e['ratio']:.2f}", f"{e['bytes'] / 1e9:.2f}",
         f"{e['flops'] / 1e12:.2f}"]
        for e in entries
    ]  # fmt: skip
    return table(HEADER, lines)
