"""Widened FFN, adapter, prefix attention and the dropout mask against plain PyTorch, in one run.

    python -m benchmarks.ops            prints the table
    python -m benchmarks.ops --record   also writes benchmarks/results/

fp32, forward + backward. Flop floors: FFN (F + R) / F and the two weight gradients, 1.19 of the
frozen block; prefix attention (S + P) / S, 1.12 of attention without a prefix.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.common import interleaved, table, write
from pelt_fast import functional
from pelt_fast.reference.philox import draw_seed, dropout


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape) / 30)


def bottleneck(inputs: int, rank: int) -> list[torch.nn.Parameter]:
    return [parameter(rank, inputs), parameter(rank), parameter(inputs, rank), parameter(inputs)]


def update(x, down, down_bias, up, up_bias, p):
    """The plain module's bottleneck."""
    return F.linear(F.dropout(F.relu(F.linear(x, down, down_bias)), p), up, up_bias)


def ffn(p: float) -> tuple:
    """2048 tokens, 1024 / 4096, R=512: the frozen block first."""
    x, weights = torch.randn(2048, 1024), bottleneck(1024, 512)
    inner = [torch.randn(4096, 1024) / 32, torch.randn(4096)]
    outer = [torch.randn(1024, 4096) / 64, torch.randn(1024)]
    packed = torch.cat([inner[0], weights[0].detach()])

    def frozen(x):
        return F.dropout(F.linear(F.gelu(F.linear(x, *inner)), *outer), p)

    def plain(x):
        return frozen(x) + 4 * update(x, *weights, p)

    def ours(x):
        return functional.ffn_parallel_adapter(
            x, *inner, *outer, *weights, scale=4.0, dropout_p=p, output_dropout_p=p, packed=packed
        )

    return {"frozen block": frozen, "plain PyTorch": plain, "pelt_fast": ours}, (x,), x.shape


def adapter(p: float) -> tuple:
    """4096 tokens, 768, R=64: the plain module first."""
    x, base, weights = torch.randn(4096, 768), torch.randn(4096, 768), bottleneck(768, 64)

    def ours(x):
        return functional.parallel_adapter(base, x, *weights, dropout_p=p)

    return (
        {"plain PyTorch": lambda x: base + update(x, *weights, p), "pelt_fast": ours},
        (x,),
        x.shape,
    )


def prefix(causal: bool, batch: int = 8, queries: int = 256, length: int = 256) -> tuple:
    """H12 D64, P=30: attention without a prefix first. One query: decoding, forward alone."""
    heads, dim, size = 12, 64, 30
    q, k, v = (torch.randn(batch, n, heads, dim).transpose(1, 2) for n in (queries, length, length))
    pk, pv = parameter(heads, size, dim), parameter(heads, size, dim)
    attend = F.scaled_dot_product_attention
    mask = F.pad(torch.ones(length, length, dtype=torch.bool).tril(), (size, 0), value=True)

    def concatenated(q, k, v):
        keys, values = (
            torch.cat([p.expand(batch, -1, -1, -1), t], 2) for p, t in ((pk, k), (pv, v))
        )
        return attend(q, keys, values, attn_mask=mask if causal else None)

    providers = {
        "no prefix": lambda q, k, v: attend(q, k, v, is_causal=causal),
        "concatenation": concatenated,
        "pelt_fast": lambda *t: functional.prefix_attention(*t, pk, pv, is_causal=causal),
    }
    if queries == 1:
        decoding = {n: torch.inference_mode()(f) for n, f in providers.items()}
        return decoding, (q, k, v), None
    return providers, (q, k, v), q.shape


def mask() -> tuple:
    """Dropout of 4096 x 1024 elements: torch's first."""
    seed = draw_seed(torch.device("cpu"))[0]
    ours = {"F.dropout": lambda x: F.dropout(x, 0.1), "Philox": lambda x: dropout(x, 0.1, seed)}
    return ours, (torch.randn(4096, 1024),), None


SUBJECTS = {
    "widened FFN, p=0": lambda: ffn(0.0),
    "widened FFN, p=0.1": lambda: ffn(0.1),
    "parallel adapter, p=0": lambda: adapter(0.0),
    "parallel adapter, p=0.1": lambda: adapter(0.1),
    "prefix attention": lambda: prefix(False),
    "prefix attention, causal": lambda: prefix(True),
    "prefix attention, one query": lambda: prefix(False, 1, 1, 32),
    "prefix attention, 32 x one query": lambda: prefix(False, 32, 1, 32),
    "dropout, forward": mask,
}


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds by subject and provider."""
    seconds = {}
    for name, subject in SUBJECTS.items():
        providers, inputs, shape = subject()
        dy = None if shape is None else torch.randn(shape)

        def step(function, inputs=inputs, dy=dy):
            if dy is None:
                return lambda: function(*inputs)
            return lambda: function(*(t.detach().requires_grad_() for t in inputs)).backward(dy)

        seconds[name] = interleaved({n: step(f) for n, f in providers.items()}, repeats)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    seconds = measure(options.repeats)
    rows = [
        [subject, name, f"{1e3 * s:.2f}", f"{s / next(iter(found.values())):.2f}"]
        for subject, found in seconds.items()
        for name, s in found.items()
    ]
    print(table(["subject", "provider", "ms", "ratio to the first"], rows))
    if options.record:
        print(f"wrote {write('ops', {'seconds': seconds}).name}")


if __name__ == "__main__":
    main()
