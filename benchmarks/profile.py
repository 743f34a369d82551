"""Which operations make a training step longer than the frozen model's.

    python -m benchmarks.profile [--model bart-768] [--method lora_qv_ffn] [--record]

A row is an operation of torch and its own time in a step of each provider. The difference to the
frozen model is the cost of the method.
"""

import argparse
import copy

import torch
from torch.profiler import ProfilerActivity, profile

import pelt_fast

from . import model, peers, text, whole
from .bench import RUNS, quiet
from .common import table
from .problems import Absent
from .record import Record
from .shapes import shape

PEERS = ["frozen", "pelt_fast", "peft"]
TOP = 14


def operations(step, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step of each operation, its callees left out."""
    for i in range(2):
        step(i)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for i in range(steps):
            step(i)
    return {e.key: e.self_cpu_time_total / 1e3 / steps for e in found.key_averages()}


def run(record: Record, model_name: str, method: str) -> list[dict]:
    """Profile each provider; the entries."""
    plan = model.Plan(methods=(method,), models=(model_name,))
    ((model_shape, name),) = model.wanted(plan)
    config, base = model.sized(name, model_shape, plan), model.made(model_shape, plan)
    injected = pelt_fast.inject(copy.deepcopy(base), config)
    batches = whole.batches(base, plan.rows, plan.source, plan.target, text.lengths(), 3, "cpu")
    for provider in peers.models(base, config, injected, PEERS):
        if isinstance(provider, Absent) or "reference" in provider.name:
            continue
        found = operations(whole.stepper(provider, batches))
        record.add(model=model_name, method=method, provider=provider.name, milliseconds=found)
    record.finish()
    return record.entries


def report(entries: list[dict]) -> str:
    """The operations that cost most more than in the frozen model."""
    times = {e["provider"]: e["milliseconds"] for e in entries}
    floor, ours = times["frozen"], times["pelt_fast"]
    more = sorted(ours, key=lambda op: floor.get(op, 0.0) - ours[op])[:TOP]
    names = list(times)
    lines = [[op, *(f"{times[p].get(op, 0.0):.1f}" for p in names)] for op in more]
    lines.append(["all operations", *(f"{sum(times[p].values()):.0f}" for p in names)])
    about = f"{entries[0]['model']}, {entries[0]['method']}: ms a step"
    return table([about, *names], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bart-768")
    parser.add_argument("--method", default="lora_qv_ffn")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    quiet()
    shape(options.model)
    torch.manual_seed(0)
    try:
        record = Record("profile", None if options.record else RUNS)
    except ValueError as error:
        parser.error(str(error))
    print(report(run(record, options.model, options.method)))
    print(f"wrote {record.path}")


if __name__ == "__main__":
    main()
