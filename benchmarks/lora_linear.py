"""LoRA linear, forward and backward, against the frozen linear and PEFT, in one run.

    python -m benchmarks.lora_linear            prints the table
    python -m benchmarks.lora_linear --record   also writes benchmarks/results/

Shape M=4096, K=N=1024, R=16, fp32 on CPU, p=0 and 0.1; the floor is the frozen linear. Traffic
beside its 4 P: 2 P + 4 P (plans/low_rank.py), flops 6MR(K + N) / 4MNK = 4.7 %.
"""

import argparse

import torch

from benchmarks.common import interleaved, table, write
from pelt_fast import functional
from pelt_fast.testing import cases, judge

M, K, N, R, SCALE = 4096, 1024, 1024, 16, 2.0


def providers(dropout_p: float) -> dict:
    """Name -> (function of x, parameters)."""
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    lora_a = torch.nn.Parameter(torch.randn(R, K) / K**0.5)
    lora_b = torch.nn.Parameter(torch.zeros(N, R))

    def fused(x):
        return functional.lora_linear(
            x, linear.weight, linear.bias, lora_a, lora_b, scale=SCALE, dropout_p=dropout_p
        )

    found = {"frozen linear": linear, "pelt_fast": fused}
    try:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=R, lora_alpha=SCALE * R, lora_dropout=dropout_p, target_modules=["0"])
        found["PEFT"] = get_peft_model(torch.nn.Sequential(torch.nn.Linear(K, N)), config)
    except ImportError as error:
        print(f"PEFT is left out: {error}")
    return found


def measure(dropout_p: float, repeats: int) -> dict[str, float]:
    """Median seconds of forward + backward to the input, by provider."""
    x, dy = torch.randn(M, K), torch.randn(M, N)

    def step(function):
        return lambda: function(x.detach().requires_grad_()).backward(dy)

    return interleaved({n: step(f) for n, f in providers(dropout_p).items()}, repeats)


def report(seconds: dict[str, dict[str, float]]) -> str:
    """The table."""
    rows = [
        [name, dropout, f"{1e3 * s:.1f}", f"{s / found['frozen linear']:.2f}"]
        for dropout, found in seconds.items()
        for name, s in found.items()
    ]
    return table([f"LoRA linear {M} x {K} x {N}, r={R}", "dropout", "ms", "ratio to frozen"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    torch.manual_seed(0)
    for case in cases((M, K, N, R)):
        if case.op == "lora" and not judge(case, "auto", torch.float32).ok:
            raise SystemExit("the op is wrong at this shape: no timing on red")
    seconds = {f"p={p}": measure(p, options.repeats) for p in (0.0, 0.1)}
    print(report(seconds))
    if options.record:
        print(f"wrote {write('lora-linear', {'shape': [M, K, N, R], 'seconds': seconds}).name}")


if __name__ == "__main__":
    main()
