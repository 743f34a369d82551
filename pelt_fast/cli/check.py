"""Compare every op on every backend with the fp64 oracle, gradients included; exit 1 on a miss."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from pelt_fast import env, testing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json FILE, --device, --op."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    ops = ("lora", "adapter", "ffn", "beside", "routed", "prefix")
    parser.add_argument("--op", choices=ops, help="only this op")


def run(options: argparse.Namespace) -> int:
    """Print a line for each comparison; returns 1 if one misses its budget."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for case in testing.cases():
        if options.op in (None, case.op):
            for result in _compared(case, device):
                print(_line(result), flush=True)
                results.append(result)
    within = sum(result["ok"] for result in results)
    print(f"{within} of {len(results)} inside their budget on {device}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(within < len(results))


def _compared(case: testing.Case, device: str) -> Iterator[dict]:
    """The result of a case on each backend and in each dtype."""
    # on a GPU "auto" runs the kernels; on a CPU they run interpreted, on request
    interpreted = device == "cpu" and env.interpret()
    for backend in ("reference", "auto", "triton") if interpreted else ("reference", "auto"):
        if testing.has_its_own_mask(case, backend, device):
            print(f"skip {case.op:<8} {case.name:<34} {backend:<10} the context's mask is the"
                  " library kernel's own: tests/numerics compares differences")  # fmt: skip
            continue
        for name, dtype in DTYPES.items():
            if backend == "triton" and dtype == torch.bfloat16:
                continue  # the interpreter computes bf16 wrongly (docs/facts.md)
            verdict = testing.judge(case, backend, dtype, device)
            yield dict(op=case.op, case=case.name, backend=backend, dtype=name, device=device,
                       **dataclasses.asdict(verdict), ok=verdict.ok)  # fmt: skip


def _line(result: dict) -> str:
    return (
        f"{'ok  ' if result['ok'] else 'MISS'} {result['op']:<8} {result['case']:<34}"
        f" {result['backend']:<10} {result['dtype']:<9} {result['tensor']:<14}"
        f" error {result['error']:.1e} of {result['budget']:.1e}"
    )
