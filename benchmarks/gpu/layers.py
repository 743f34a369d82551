"""Whole layers, forward and backward, compared with the frozen layer and the peers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks.common import newest, table
from pelt_fast import functional
from pelt_fast.kernels import config
from pelt_fast.modules.packing import Packing, Packings
from pelt_fast.ops.common import native_cuda

from .measure import eager_milliseconds, graph_milliseconds
from .record import Record


@dataclass(frozen=True)
class Layers:
    """Shapes of the targets."""

    m: int = 8192
    k: int = 4096
    rank: int = 16
    ffns: tuple[tuple[int, int], ...] = ((4096, 14336), (1024, 4096))
    ffn_rank: int = 512
    attention: tuple[int, int, int, int] = (16, 16, 1024, 64)
    prefix: int = 30


@dataclass(frozen=True)
class Layer:
    """A layer: its floor, and the providers by name, each a function of the input."""

    name: str
    shape: tuple[int, ...]
    floor: Callable
    providers: dict[str, Callable]
    target: float
    trained: tuple[torch.nn.Parameter, ...]


@dataclass(frozen=True)
class Forced:
    """A provider under one answer of a table of ``kernels.config``, forward and backward."""

    function: Callable
    table: str
    answer: str


def peft_lora(weight, rank: int, p: float, dtype) -> Callable | None:
    """PEFT's LoRA on the same linear, or None."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        print(f"PEFT is left out: {error}")
        return None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model = torch.nn.Sequential(linear.to(weight.device, weight.dtype))
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules=["0"])
    return get_peft_model(model, settings, autocast_adapter_dtype=dtype == torch.float32).train()


def layers(device: torch.device, sizes: Layers, dtype=torch.bfloat16) -> Iterator[Layer]:
    """One at a time."""

    def randn(*shape, of=dtype):
        return torch.randn(*shape, device=device).to(of)

    def trained(*shape):
        return torch.nn.Parameter(randn(*shape, of=torch.float32) / shape[-1] ** 0.5)

    k, r = sizes.k, sizes.rank
    weight, a, b = randn(k, k) / k**0.5, trained(r, k), trained(k, r)
    for p, target in ((0.0, 1.20), (0.1, 1.30)):

        def lora(x, p=p, weight=weight, a=a, b=b):
            return functional.lora_linear(x, weight, None, a, b, scale=2.0, dropout_p=p)

        names = ["accumulate", "tail", "tail_descriptor"]
        names += ["tail_cuda"] if native_cuda.why_missing() is None else []
        plans = {f"plan {name}": Forced(lora, "plan", name) for name in names}
        if "tail_cuda" in names:
            kernels = ("triton", "cuda")
            plans |= {f"one pass {name}": Forced(lora, "one_pass", name) for name in kernels}
        peers = {"PEFT": peft_lora(weight, r, p, torch.float32),
                 f"PEFT, {dtype} factors": peft_lora(weight, r, p, dtype)}  # fmt: skip
        peers = {name: peer for name, peer in peers.items() if peer is not None}
        providers = {"pelt_fast": lora, **plans, **peers}
        floor = lambda x, weight=weight: F.linear(x, weight)  # noqa: E731
        yield Layer(f"LoRA linear {k} R={r} p={p}", (sizes.m, k), floor, providers, target, (a, b))
    for k, inner in sizes.ffns:
        r = sizes.ffn_rank
        w1, w2 = randn(inner, k) / k**0.5, randn(k, inner) / inner**0.5
        b1, b2 = randn(inner), randn(k)
        small = trained(r, k), trained(1, r), trained(k, r), trained(1, k)
        frozen_weights = [torch.nn.Parameter(w, requires_grad=False) for w in (w1, w2)]
        packings = Packings(Packing(0, r), Packing(1, r))
        packings.pack(frozen_weights[:1], frozen_weights[1])

        def widened(x, w=frozen_weights, b=(b1, b2), small=small, packings=packings):
            down, d, up, u = small
            return functional.ffn_parallel_adapter(
                x, w[0], b[0], w[1], b[1], down, d.view(-1), up, u.view(-1), scale=4.0,
                packings=packings,
            )  # fmt: skip

        def frozen(x, w=(w1, b1, w2, b2)):
            return F.linear(F.gelu(F.linear(x, w[0], w[1])), w[2], w[3])

        def plain(x, frozen=frozen, small=small):
            down, d, up, u = (t.to(x.dtype) for t in small)
            return frozen(x) + 4.0 * F.linear(F.relu(F.linear(x, down, d[0])), up, u[0])

        flop_ratio = 1 + 1.5 * r / inner
        yield Layer(
            f"widened FFN {k}/{inner} R={r}, flop ratio {flop_ratio:.3f}", (sizes.m, k), frozen,
            {"pelt_fast": widened, "plain adapter": plain}, 1.05 * flop_ratio, small,
        )  # fmt: skip
    batch, heads, length, dim = sizes.attention
    prefix = trained(heads, sizes.prefix, dim), trained(heads, sizes.prefix, dim)
    for causal in (False, True):

        def split(qkv):
            # (B, T, 3, H, D), as one projection of a model gives it
            return (t.transpose(1, 2) for t in qkv.unbind(2))

        def attention(qkv, causal=causal):
            y = F.scaled_dot_product_attention(*split(qkv), is_causal=causal)
            return y.transpose(1, 2)

        def prefixed(qkv, causal=causal):
            y = functional.prefix_attention(*split(qkv), *prefix, is_causal=causal)
            return y.transpose(1, 2)

        def concatenated(qkv, causal=causal):
            q, k, v = split(qkv)
            pk, pv = (t.to(q.dtype).expand(batch, -1, -1, -1) for t in prefix)
            mask = None
            if causal:
                ones = torch.ones(length, length + sizes.prefix, dtype=torch.bool, device=device)
                mask = ones.tril(sizes.prefix)
            y = F.scaled_dot_product_attention(
                q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), attn_mask=mask
            )
            return y.transpose(1, 2)

        yield Layer(
            f"prefix attention B{batch} H{heads} S{length} D{dim} P={sizes.prefix}"
            + (" causal" if causal else ""),
            (batch, length, 3, heads, dim), attention,
            {"pelt_fast": prefixed, "context flash": Forced(prefixed, "context", "flash"),
             "context cudnn": Forced(prefixed, "context", "cudnn"),
             "concatenation": concatenated}, 1.15, prefix,
        )  # fmt: skip


def gradient_of(layer: Layer, x) -> torch.Tensor:
    """A random dy, laid out in memory as the next layer's GEMM gives it."""
    return torch.randn_like(layer.floor(x), memory_format=torch.contiguous_format)


def step(layer: Layer, function: Callable | Forced, x, dy) -> Callable[[], None]:
    """Forward and backward to the input; every provider's gradients start as None."""
    if isinstance(function, Forced):
        inner = step(layer, function.function, x, dy)

        def forced():
            with config.forced(function.table, function.answer):
                inner()

        return forced
    own = function.parameters() if isinstance(function, torch.nn.Module) else layer.trained
    parameters = list(own)

    def run():
        leaf = x.detach().requires_grad_()
        for p in parameters:
            p.grad = None
        function(leaf).backward(dy)

    return run


# names of the prediction for the names of a row
PREDICTED = {
    "pelt_fast": ("kernels", "kernels, accumulate"),
    "plan accumulate": ("kernels, accumulate",),
    "plan tail": ("kernels, tail",),
    "PEFT": ("PEFT",),
    "plain adapter": ("plain PyTorch",),
    "concatenation": ("concatenation",),
}


def predictions() -> dict[tuple[str, str], float]:
    """(layer, provider) -> ratio, from the newest committed prediction."""
    try:
        entries = newest("predict-h200")["entries"]
    except FileNotFoundError:
        return {}
    return {(e["layer"], e["provider"]): e["ratio"] for e in entries}


def predicted(known: dict[tuple[str, str], float], layer: str, provider: str) -> float | None:
    """The ratio that was predicted for a row, or None."""
    layer = layer.partition(", flop ratio")[0]
    names = PREDICTED.get(provider, ())
    places = [(name, each) for name in (layer, f"{layer} p=0.0") for each in names]
    return next((known[place] for place in places if place in known), None)


def run(record: Record, device: torch.device, sizes: Layers | None = None) -> int:
    """Measure every layer, launched from Python and replayed as a CUDA graph. A provider that fails
    gets a row with the error."""
    missed = 0
    for layer in layers(device, sizes or Layers()):
        if not record.in_time:
            record.leave(layer.name)
            continue
        x = torch.randn(*layer.shape, device=device).to(torch.bfloat16)
        dy = gradient_of(layer, x)
        floor = _times(step(layer, layer.floor, x, dy), device)
        record.add(layer=layer.name, provider="frozen", **floor)
        for name, provider in layer.providers.items():
            try:
                found = _times(step(layer, provider, x, dy), device)
            except Exception as error:  # a provider that fails is a result
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
                record.add(layer=layer.name, provider=name, failed=reason)
                continue
            ratio = _ratio(found, floor)
            missed += name == "pelt_fast" and ratio > layer.target
            record.add(layer=layer.name, provider=name, target=layer.target, ratio=ratio, **found)
    record.finish(missed=missed)
    print(report(record.entries))
    return 0


HEADER = ["layer", "provider", "ms", "to frozen", "graph, ms", "to frozen", "predicted", "target"]


def report(entries: list[dict]) -> str:
    """Every row beside its floor: launched from Python, as a CUDA graph, as predicted."""
    known, rows = predictions(), []
    floors = {e["layer"]: e for e in entries if e["provider"] == "frozen"}
    for e in entries:
        layer, name = e["layer"], e["provider"]
        if "failed" in e:
            rows.append([layer, name, e["failed"], *[""] * 5])
            continue
        guess, target = predicted(known, layer, name), ""
        if name == "pelt_fast":
            target = f"{e['target']:.2f}, {'met' if e['ratio'] <= e['target'] else 'MISSED'}"
        cells = _cells(e, floors[layer])
        rows.append([layer, name, *cells, "" if guess is None else f"{guess:.2f}", target])
    return table(HEADER, rows)


def _times(function: Callable[[], None], device: torch.device) -> dict[str, float | None]:
    taken, low, high = eager_milliseconds(function, device)
    graph = graph_milliseconds(function, device)
    return dict(milliseconds=taken, low=low, high=high, graph_milliseconds=graph)


def _ratio(found: dict, floor: dict) -> float:
    """Of the graphs where both were captured: the targets are the device's."""
    graphs = found["graph_milliseconds"], floor["graph_milliseconds"]
    return graphs[0] / graphs[1] if all(graphs) else found["milliseconds"] / floor["milliseconds"]


def _cells(found: dict, floor: dict) -> list[str]:
    cells = []
    for name in ("milliseconds", "graph_milliseconds"):
        known = found[name] is not None and floor[name] is not None
        cells += [f"{found[name]:.3f}", f"{found[name] / floor[name]:.2f}"] if known else ["", ""]
    return cells
