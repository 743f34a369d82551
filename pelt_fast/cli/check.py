"""Compare every op on every backend with the fp64 oracle, gradients included; exit 1 on a miss."""

import argparse
import json
from pathlib import Path

import torch

from pelt_fast import env, testing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json FILE, --device, --op."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    parser.add_argument("--op", choices=("lora", "adapter", "ffn", "prefix"), help="only this op")


def run(options: argparse.Namespace) -> int:
    """Print a line for each comparison."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results, misses = [], 0
    # on a GPU "auto" runs the kernels; on a CPU they are asked for, interpreted
    interpreted = device == "cpu" and env.interpret()
    backends = ("reference", "auto", "triton") if interpreted else ("reference", "auto")
    for case in testing.cases():
        if options.op not in (None, case.op):
            continue
        for backend in backends:
            if testing.has_its_own_mask(case, backend, device):
                print(f"skip {case.op:<8} {case.name:<34} {backend:<10} the context's mask is the"
                      " library kernel's own: tests/numerics compares differences")  # fmt: skip
                continue
            for name, dtype in DTYPES.items():
                if backend == "triton" and interpreted and dtype == torch.bfloat16:
                    continue  # the interpreter computes bf16 wrongly (docs/facts.md)
                verdict = testing.judge(case, backend, dtype, device)
                misses += not verdict.ok
                results.append(
                    dict(op=case.op, case=case.name, backend=backend, dtype=name, device=device,
                         tensor=verdict.tensor, error=verdict.error, budget=verdict.budget,
                         ok=verdict.ok)
                )  # fmt: skip
                print(
                    f"{'ok  ' if verdict.ok else 'MISS'} {case.op:<8} {case.name:<34}"
                    f" {backend:<10} {name:<9} {verdict.tensor:<14}"
                    f" error {verdict.error:.1e} of {verdict.budget:.1e}",
                    flush=True,
                )
    print(f"{len(results) - misses} of {len(results)} inside their budget on {device}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if misses else 0
