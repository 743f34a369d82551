"""What tests, ``pelt-fast check`` and benchmarks share: cases of every op, each with the plain
PyTorch expression it stands for, and the error budget.

The expression, run by autograd in fp64, is the oracle: it shares no line with the references or
the plans. Run in the case's own dtype it sets the budget: an op may be at most twice as far from
the oracle as PyTorch itself, plus a rounding band.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast import functional
from pelt_fast.ops.common.backends import backend
from pelt_fast.ops.common.dropout import draw_seed, dropout

ROUNDING_BAND = 4  # units of eps * the oracle's largest magnitude

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op on one input: ``call`` is ours, ``expression`` the same in plain PyTorch.

    ``make(dtype)`` gives the tensors by name; those in ``trainable`` stay fp32 beside a
    low-precision activation. Tensors that require a gradient are compared in theirs.
    """

    op: str
    name: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors], Tensor]
    expression: Callable[[Tensors], Tensor]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, wide: torch.dtype, device="cpu") -> Tensors:
        """The inputs: activations and frozen weights in ``dtype``, the trainable in ``wide``,
        rounded to ``dtype`` first so that every precision sees the same numbers."""
        result = {}
        generator = torch.random.get_rng_state()
        torch.manual_seed(1)
        for name, value in self.make().items():
            if value.is_floating_point():
                value = value.to(dtype)
                value = value.to(wide if name in self.trainable else dtype)
                value.requires_grad_(name not in self.frozen)
            result[name] = value.to(device)
        torch.random.set_rng_state(generator)
        return result


def run(function: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensors:
    """Output and gradients of ``function`` for a fixed seed and output gradient."""
    leaves = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        y = function(leaves)
        torch.manual_seed(3)
        dy = torch.randn(y.shape, dtype=torch.float32).to(y)
    wanted = {name: value for name, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}


@dataclass(frozen=True)
class Verdict:
    """The worst tensor of one comparison: its error and budget, relative to the oracle's
    largest magnitude."""

    tensor: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether every tensor is finite and inside its budget."""
        return self.error <= self.budget


def compare(actual: Tensors, same_dtype: Tensors, oracle: Tensors, dtype: torch.dtype) -> Verdict:
    """Judge ``actual`` by the budget; the verdict of the tensor nearest to (or past) its own."""
    worst = None
    for name, exact in oracle.items():
        if exact.numel() == 0:
            continue
        size = exact.abs().max().item() or 1.0
        error = (actual[name].double() - exact).abs().max().item() / size
        torchs = (same_dtype[name].double() - exact).abs().max().item() / size
        if not torch.isfinite(actual[name]).all():
            error = float("inf")
        verdict = Verdict(name, error, 2 * torchs + ROUNDING_BAND * torch.finfo(dtype).eps)
        if worst is None or verdict.error / verdict.budget > worst.error / worst.budget:
            worst = verdict
    return worst


def has_its_own_mask(case: Case, backend_name: str, device) -> bool:
    """Whether ``case`` drops by a mask no oracle knows: attention dropout on a GPU is the library
    kernel's."""
    on_gpu = torch.device(device).type == "cuda" and backend_name != "reference"
    return on_gpu and case.op == "prefix" and "p=0.0" not in case.name


def judge(case: Case, backend_name: str, dtype: torch.dtype, device="cpu") -> Verdict:
    """Run ``case`` on a backend and compare output and every gradient with the fp64 oracle."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = case.tensors(dtype, wide, device)
    with backend(backend_name):
        actual = run(case.call, tensors)
    same_dtype = run(case.expression, tensors)
    oracle = run(case.expression, case.tensors(dtype, wide, device) | doubled(tensors))
    return compare(actual, same_dtype, oracle, dtype)


def doubled(tensors: Tensors) -> Tensors:
    """The floating tensors in fp64, leaves again."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
        if value.is_floating_point()
    }


def cases(sizes: tuple[int, int, int, int] = (37, 52, 44, 5)) -> Iterator[Case]:
    """Every op in every form; ``sizes`` are M, K, N, R of the low-rank and FFN cases."""
    for p in (0.0, 0.1):
        yield _lora(*sizes, p)
        for layer_norm in ("none", "in", "out"):
            for base in (True, False):
                yield _adapter(*sizes, p, layer_norm, base)
        for gated in (False, True):
            yield _ffn(*sizes, p, gated)
        yield _ffn(*sizes, p, gated=False, separate=True)
        for form, composition in (("softmax", "gated"), ("softmax", "add"), ("relu", "add")):
            yield _prefix(p, form, composition, causal=form == "softmax", masked=p == 0)
        yield _prefix(p, "softmax", "gated", causal=False, masked=True)


def _lora(m: int, k: int, n: int, r: int, p: float) -> Case:
    def make():
        return dict(x=torch.randn(m, k), weight=torch.randn(n, k) / k**0.5, bias=torch.randn(n),
                    lora_a=torch.randn(r, k) / k**0.5, lora_b=torch.randn(n, r))  # fmt: skip

    def call(t):
        return functional.lora_linear(**t, scale=2.0, dropout_p=p)

    def expression(t):
        x, low = t["x"], t["x"].dtype
        dropped = _dropped(x, p, _seeds(x, p, 1), 0)
        update = F.linear(F.linear(dropped, t["lora_a"].to(low)), t["lora_b"].to(low))
        return F.linear(x, t["weight"], t["bias"]) + 2.0 * update

    return Case("lora", f"p={p}", make, call, expression, ("lora_a", "lora_b"), ("weight", "bias"))


def _seeds(x: Tensor, p: float, count: int) -> Tensor | None:
    return draw_seed(x.device, count) if p > 0 else None


def _dropped(x: Tensor, p: float, seeds: Tensor | None, row: int) -> Tensor:
    """The definition of the mask, differentiated by autograd."""
    return x if seeds is None else dropout(x, p, seeds[row])


_BOTTLENECK = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


def _bottleneck(k: int, n: int, r: int) -> Tensors:
    return dict(down_weight=torch.randn(r, k) / k**0.5, down_bias=torch.randn(r),
                up_weight=torch.randn(n, r) / r**0.5, up_bias=torch.randn(n))  # fmt: skip


def _update(x, t: Tensors, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """The bottleneck: drop(relu(x Dᵀ + d)) Uᵀ + u."""
    small = {name: t[name].to(x.dtype) for name in _BOTTLENECK[:4]}
    h = drop(F.relu(F.linear(x, small["down_weight"], small["down_bias"])))
    return F.linear(h, small["up_weight"], small["up_bias"])


def _adapter(m: int, k: int, n: int, r: int, p: float, layer_norm: str, parallel: bool) -> Case:
    n = n if parallel else k
    width = k if layer_norm == "in" else n

    def make():
        t = dict(x=torch.randn(m, k), **_bottleneck(k, n, r))
        if parallel:
            t["base_out"] = torch.randn(m, n)
        if layer_norm != "none":
            t |= dict(norm_weight=torch.rand(width) + 0.5, norm_bias=torch.randn(width))
        return t

    def call(t):
        settings = dict(scale=1.5, layer_norm=layer_norm, dropout_p=p)
        if parallel:
            return functional.parallel_adapter(**t, **settings)
        h = t["x"]
        return functional.sequential_adapter(
            h, **{name: value for name, value in t.items() if name != "x"}, **settings
        )

    def expression(t):
        x, seeds = t["x"], _seeds(t["x"], p, 1)

        def norm(z):
            weights = (t[name].to(z.dtype) for name in ("norm_weight", "norm_bias"))
            return F.layer_norm(z, (width,), *weights)

        u = norm(x) if layer_norm == "in" else x
        z = 1.5 * _update(u, t, lambda h: _dropped(h, p, seeds, 0))
        return (t["base_out"] if parallel else x) + (norm(z) if layer_norm == "out" else z)

    kind = "parallel" if parallel else "sequential"
    return Case("adapter", f"{kind} norm={layer_norm} p={p}", make, call, expression, _BOTTLENECK)


def _ffn(m: int, k: int, n: int, r: int, p: float, gated: bool, separate: bool = False) -> Case:
    inner = 2 * k + 3
    frozen = ("in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias")

    def make():
        t = dict(x=torch.randn(m, k), in_weight=torch.randn(inner, k) / k**0.5,
                 in_bias=torch.randn(inner), out_weight=torch.randn(n, inner) / inner**0.5,
                 out_bias=torch.randn(n), **_bottleneck(k, n, r))  # fmt: skip
        if separate:
            t |= dict(adapter_x=torch.randn(m, k))
        if gated:
            t |= dict(gate_weight=torch.randn(inner, k) / k**0.5, gate_bias=torch.randn(inner))
        return t

    def call(t):
        parts = [t["gate_weight"]] if gated else []
        parts += [t["in_weight"], t["down_weight"].detach().to(t["x"].dtype)]
        packed = torch.cat([*parts, parts[0].new_zeros(11, k)])
        up = 2.0 * t["up_weight"].detach().to(t["x"].dtype)
        packed_out = torch.cat([t["out_weight"], up, up.new_zeros(n, 5)], 1)
        return functional.ffn_parallel_adapter(
            **t, packed=None if separate else packed, packed_out=packed_out, scale=2.0, dropout_p=p,
            activation_dropout_p=p, output_dropout_p=p,
        )  # fmt: skip

    def expression(t):
        x, seeds = t["x"], _seeds(t["x"], p, 3)
        z = F.linear(x, t["in_weight"], t["in_bias"])
        h = F.gelu(F.linear(x, t["gate_weight"], t["gate_bias"])) * z if gated else F.gelu(z)
        y = F.linear(_dropped(h, p, seeds, 1), t["out_weight"], t["out_bias"])
        read = t.get("adapter_x", x)
        update = 2.0 * _update(read, t, lambda h: _dropped(h, p, seeds, 0))
        return _dropped(y, p, seeds, 2) + update

    name = f"{'gated' if gated else 'plain'}{' separate' if separate else ''} p={p}"
    return Case("ffn", name, make, call, expression, _BOTTLENECK, frozen)


def _prefix(p: float, form: str, composition: str, causal: bool, masked: bool) -> Case:
    batch, heads, kv_heads, queries, keys, dim, length = 3, 4, 2, 9, 13, 8, 5

    def make():
        t = dict(q=torch.randn(batch, heads, queries, dim))
        t |= {name: torch.randn(batch, kv_heads, keys, dim) for name in ("k", "v")}
        t |= {name: torch.randn(kv_heads, length, dim) for name in ("prefix_k", "prefix_v")}
        if masked:
            t["attn_mask"] = torch.rand(batch, 1, queries, keys) > 0.3
            t["attn_mask"][0, :, 2] = False  # a row that sees no key at all
        return t

    def call(t):
        return functional.prefix_attention(
            **t, is_causal=causal, form=form, composition=composition, dropout_p=p
        )

    def expression(t):
        seeds = _seeds(t["q"], p, 2)
        return _prefix_expression(t, form, composition, causal, p, seeds)

    name = f"{form} {composition}{' causal' if causal else ''}{' masked' if masked else ''} p={p}"
    return Case("prefix", name, make, call, expression, ("prefix_k", "prefix_v"))


def _prefix_expression(t, form, composition, causal, p, seeds) -> Tensor:
    """Concatenation: one softmax over [prefix; context], or two weights side by side."""
    q, low = t["q"], t["q"].dtype
    group = q.shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(group, 1) for name in ("k", "v"))
    pk, pv = (t[name].to(low).repeat_interleave(group, 0) for name in ("prefix_k", "prefix_v"))
    pk, pv = (prefix.expand(q.shape[0], -1, -1, -1) for prefix in (pk, pv))
    scale, length = q.shape[-1] ** -0.5, pk.shape[2]
    scores = scale * q @ torch.cat([pk, k], 2).transpose(-1, -2)
    visible = t.get("attn_mask")
    if causal:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        below = (columns <= rows + k.shape[2] - q.shape[2]).to(q.device)
        visible = below if visible is None else visible & below
    prefix, context = scores[..., :length], scores[..., length:]
    if visible is not None:
        context = context.masked_fill(~visible, float("-inf"))
    if composition == "gated":
        weights = torch.softmax(torch.cat([prefix, context], -1), -1)
        w_prefix, w_context = weights[..., :length], weights[..., length:]
    else:
        w_prefix = torch.softmax(prefix, -1) if form == "softmax" else F.relu(prefix)
        if visible is not None:
            # rows that see nothing are 0: softmax over a safe row, then masked out
            context = context.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        w_context = torch.softmax(context, -1)
        if visible is not None:
            w_context = w_context * visible.any(-1, keepdim=True)
    return _dropped(w_prefix, p, seeds, 0) @ pv + _dropped(w_context, p, seeds, 1) @ v
