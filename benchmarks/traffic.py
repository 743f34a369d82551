"""Bytes moved by each op, forward and backward, ours and its peers, in passes P.

    pelt-fast bench traffic [--record] [--method lora adapter ffn prefix]

P is one read or write of the layer's input, M x K (attention: of the queries, B H T D). Counted at
the dispatcher, our Triton kernels by their arguments (``bytes_moved``); no time is measured, and
the numbers are the same on every machine. bf16 activations. "kernels" is the plan of a GPU, "plan"
the plan of a CPU. On a CPU a weight gradient in fp32 needs casts, block by block, which stay in
cache but are counted. Every row includes the frozen layer's own passes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.bytes_moved import Counter, counted_kernels
from benchmarks.common import check_names, table
from benchmarks.record import Record
from pelt_fast import backend, functional
from pelt_fast.kernels import config
from pelt_fast.ops.common import gemm

M, K, N, R = 8192, 4096, 4096, 16
INNER, RANK = 14336, 512
ATTENTION = dict(batch=4, heads=8, queries=1024, dim=64, prefix=30)


@dataclass(frozen=True)
class Case:
    """A subject: ``pass_elements`` of P, and providers by name, each (inputs, function)."""

    subject: str
    pass_elements: int
    providers: dict[str, tuple[tuple[Tensor, ...], Callable]]


@dataclass(frozen=True)
class Passes:
    """The passes of one provider, in P."""

    subject: str
    provider: str
    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def low(*shape: int, device="meta") -> Tensor:
    """An activation or a frozen weight. Nothing is computed on the meta device, only counted."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def trained(*shape: int, device="meta") -> torch.nn.Parameter:
    """A trainable matrix."""
    return torch.nn.Parameter(torch.randn(*shape, device=device))


@dataclass(frozen=True)
class Ours:
    """``function`` under a CPU's plan, or with the kernels of an H100 or H200 and ``plan`` for
    LoRA's rank update."""

    function: Callable
    where: str
    plan: str = "accumulate"

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """The context in which forward and backward run."""
        if self.where == "plan":
            yield
            return
        kept = config.architecture, config.processors, gemm.writes_fp32
        config.architecture = lambda device: "sm90"
        config.processors = lambda device: 132
        gemm.writes_fp32 = lambda device: True
        try:
            with backend("triton"), config.forced("plan", self.plan):
                yield
        finally:
            config.architecture, config.processors, gemm.writes_fp32 = kept


def lora(p: float) -> Case:
    """LoRA linear against PEFT's default, PEFT with bf16 factors, and plain PyTorch."""
    weight, bias = low(N, K), low(N)
    a, b = trained(R, K), trained(N, R)

    def fused(x):
        return functional.lora_linear(x, weight, bias, a, b, scale=2.0, dropout_p=p)

    def plain(x):
        s = F.linear(F.dropout(x, p), a.to(x.dtype))
        return F.linear(x, weight, bias) + 2.0 * F.linear(s, b.to(x.dtype))

    x = (low(M, K),)
    providers = {
        "frozen": (x, lambda x: F.linear(x, weight, bias)),
        "kernels, accumulate": (x, Ours(fused, "kernels")),
        "kernels, tail": (x, Ours(fused, "kernels", "tail")),
        "plain PyTorch": (x, plain),
    }
    if p == 0:  # with dropout the CPU's plan makes masks in integers, block by block
        providers["plan"] = (x, Ours(fused, "plan"))
    for name, dtype in (("PEFT", torch.float32), ("PEFT, bf16 factors", torch.bfloat16)):
        layer = _peft_lora(p, dtype)
        if layer is not None:
            providers[name] = (x, layer)
    return Case(f"LoRA linear {K} R={R} p={p}", M * K, providers)


def _peft_lora(p: float, dtype: torch.dtype) -> Callable | None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    linear = torch.nn.Linear(K, N, dtype=torch.bfloat16, device="meta")
    settings = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(linear), settings)
    layer = model.base_model.model[0]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device="meta", dtype=dtype)
    return layer


def ffn(p: float, width: int | None = None, inner: int | None = None) -> Case:
    """The feed-forward block with a parallel adapter; p is the model's own output dropout. Without
    sizes it is K wide and INNER inside."""
    width, inner = width or K, inner or INNER
    w1, b1, w2, b2 = low(inner, width), low(inner), low(width, inner), low(width)
    small = trained(RANK, width), trained(RANK), trained(width, RANK), trained(width)
    packed = torch.cat([w1, low(RANK, width)])
    packed_out = torch.cat([w2, low(width, RANK)], 1) if p == 0 else None

    def frozen(x):
        return F.dropout(F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), p)

    def fused(x):
        return functional.ffn_parallel_adapter(
            x, w1, b1, w2, b2, *small, scale=4.0, output_dropout_p=p, packed=packed,
            packed_out=packed_out,
        )  # fmt: skip

    def plain(x):
        down, d, up, u = (t.to(x.dtype) for t in small)
        return frozen(x) + 4.0 * F.linear(F.relu(F.linear(x, down, d)), up, u)

    x = (low(M, width),)
    providers = {"frozen": (x, frozen), "kernels": (x, Ours(fused, "kernels"))}
    if p == 0:
        providers["plan"] = (x, Ours(fused, "plan"))
    providers["plain PyTorch"] = (x, plain)
    return Case(f"widened FFN {width}/{inner} R={RANK} p={p}", M * width, providers)


def ffn_beside() -> Case:
    """The feed-forward block on a normed input, its adapter on the residual stream (mBART): two
    inputs, one output."""
    w1, b1, w2, b2 = low(INNER, K), low(INNER), low(K, INNER), low(K)
    small = trained(RANK, K), trained(RANK), trained(K, RANK), trained(K)
    packed_out = torch.cat([w2, low(K, RANK)], 1)

    def frozen(n, x):
        return F.linear(F.gelu(F.linear(n, w1, b1)), w2, b2)

    def fused(n, x):
        return functional.ffn_parallel_adapter(
            n, w1, b1, w2, b2, *small, adapter_x=x, scale=4.0, packed_out=packed_out
        )

    def plain(n, x):
        down, d, up, u = (t.to(x.dtype) for t in small)
        return frozen(n, x) + 4.0 * F.linear(F.relu(F.linear(x, down, d)), up, u)

    inputs = (low(M, K), low(M, K))
    providers = {"frozen": (inputs, frozen), "kernels": (inputs, Ours(fused, "kernels")),
                 "plain PyTorch": (inputs, plain)}  # fmt: skip
    return Case(f"FFN {K}/{INNER}, adapter R={RANK} on the residual stream", M * K, providers)


def adapter(sequential: bool) -> Case:
    """The adapter alone."""
    small = trained(64, K), trained(64), trained(K, 64), trained(K)

    def fused(x, base=None):
        if base is None:
            return functional.sequential_adapter(x, *small)
        return functional.parallel_adapter(base, x, *small, scale=4.0)

    def plain(x, base=None):
        down, d, up, u = (t.to(x.dtype) for t in small)
        z = F.linear(F.relu(F.linear(x, down, d)), up, u)
        return x + z if base is None else base + 4.0 * z

    inputs = (low(M, K),) if sequential else (low(M, K), low(M, K))
    providers = {"kernels": (inputs, Ours(fused, "kernels")), "plan": (inputs, Ours(fused, "plan")),
                 "plain PyTorch": (inputs, plain)}  # fmt: skip
    kind = "sequential" if sequential else "parallel"
    return Case(f"{kind} adapter R=64", M * K, providers)


def prefix(causal: bool, **changes: int) -> Case:
    """Attention with a prefix against concatenation; the frozen attention beside them."""
    sizes = ATTENTION | changes
    shape = sizes["batch"], sizes["queries"], sizes["heads"], sizes["dim"]
    qkv = tuple(low(*shape, device="cpu").transpose(1, 2) for _ in range(3))  # flash is not on meta
    prefix_shape = sizes["heads"], sizes["prefix"], sizes["dim"]
    pk, pv = (trained(*prefix_shape, device="cpu") for _ in range(2))

    def fused(q, k, v):
        return functional.prefix_attention(q, k, v, pk, pv, is_causal=causal)

    def frozen(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def concatenated(q, k, v):
        both = [
            torch.cat([p.to(q.dtype).expand(q.shape[0], -1, -1, -1), t], 2)
            for p, t in zip((pk, pv), (k, v))
        ]
        mask = None
        if causal:
            length = q.shape[2]
            mask = torch.ones(length, length + sizes["prefix"], dtype=torch.bool)
            mask = mask.tril(sizes["prefix"])
        return F.scaled_dot_product_attention(q, *both, attn_mask=mask)

    providers = {"frozen": (qkv, frozen), "kernels": (qkv, Ours(fused, "kernels")),
                 "concatenation": (qkv, concatenated)}  # fmt: skip
    name = (f"prefix attention B{sizes['batch']} H{sizes['heads']} S{sizes['queries']}"
            f" D{sizes['dim']} P={sizes['prefix']}{' causal' if causal else ''}")  # fmt: skip
    return Case(name, qkv[0].numel(), providers)


CASES: dict[str, Callable[[], list[Case]]] = {
    "lora": lambda: [lora(0.0), lora(0.1)],
    "adapter": lambda: [adapter(False), adapter(True)],
    "ffn": lambda: [ffn(0.0), ffn(0.1), ffn_beside()],
    "prefix": lambda: [prefix(False), prefix(True)],
}


def cases(methods: list[str] | None = None, known=CASES) -> list[Case]:
    """The subjects of ``methods``, all by default."""
    return [case for name in chosen(methods, known) for case in known[name]()]


def chosen(methods: list[str] | None = None, known=CASES) -> list[str]:
    """The requested methods; ValueError lists the known ones."""
    check_names("method", methods or (), known)
    return list(methods or known)


def parameters_of(function: Callable) -> list[Tensor]:
    """The weights a provider closes over, or holds as a module."""
    if isinstance(function, torch.nn.Module):
        return list(function.parameters())
    found, seen = [], set()
    queue = [function.function if isinstance(function, Ours) else function]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            queue.extend(item)
        elif callable(item) and getattr(item, "__closure__", None):
            queue.extend(cell.cell_contents for cell in item.__closure__)
    return found


def count(
    inputs: tuple[Tensor, ...], function: Callable, parameters: list[Tensor]
) -> tuple[Counter, Counter]:
    """The operations of forward and of backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    forward, backward = (Counter(parameters) for _ in range(2))
    with function.context() if isinstance(function, Ours) else contextlib.nullcontext():
        with counted_kernels(forward), forward:
            y = function(*leaves)
        backward.known = forward.known
        dy = torch.randn_like(y)
        with counted_kernels(backward), backward:
            y.backward(dy)
    return forward, backward


def measure(case: Case) -> list[Passes]:
    """The passes of each provider of a case."""
    rows = []
    for name, (inputs, function) in case.providers.items():
        forward, backward = count(inputs, function, parameters_of(function))
        unit = case.pass_elements * inputs[0].element_size()
        rows.append(Passes(case.subject, name, forward.bytes / unit, backward.bytes / unit))
    return rows


def run(record: Record, methods: list[str] | None = None) -> list[dict]:
    """Count everything; the entries."""
    for case in cases(methods):
        for row in measure(case):
            record.add(**vars(row), both=row.both)
    record.finish()
    return record.entries


def report(entries: list[dict]) -> str:
    """The table."""
    lines = [
        [
            e["subject"],
            e["provider"],
            *(f"{e[part]:.1f}" for part in ("forward", "backward", "both")),
        ]
        for e in entries
    ]
    return table(["subject", "provider", "forward, P", "backward, P", "both, P"], lines)
