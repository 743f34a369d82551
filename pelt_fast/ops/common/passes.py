"""Passes over large tensors, forward. The ``cpu`` files call them.

Shapes   x, base (M, K) or (M, N); a (R, K); b (N, R); s, h (M, R).
In C++ (csrc/cpu/) each is one pass over its large tensors, and the dropout mask is made in
registers. Without C++ the library's GEMMs and elementwise kernels run, with the mask of one block
of rows at a time. The C++ code multiplies fp32 and packs its weight first. So products without a
mask run in the library if they have few rows, or if they round to 16 bits and the processor has
arithmetic for these; and any product above ``PLAIN_RANK`` or ``MASKED_RANK``.
``covered`` is the result of :func:`covers_rows`, if the caller has checked all its tensors at once.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from . import gemm, native
from .activations import ACTIVATIONS
from .bundles import Bottleneck, Dropout, FrozenFFN
from .dropout import cpp_mask, drop_, drop_factor, row_blocks

MAX_RANK = 128  # kMaxRank of csrc/cpu/tile.h
FEW_ROWS = 16  # a decoder's: the C++ packs its weight first (python -m benchmarks.host)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_MASK = (None, 0, 1.0)  # the mask arguments of the C++ code if nothing is dropped

# f without a gate and a mask that the library computes faster: on AVX2 it takes 0.7 of our time for
# these, and twice our time for gelu_tanh and tanh (python -m benchmarks.activations)
_ON_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
LIBRARY_IS_FASTER = ("identity", "relu", "gelu", "silu") if _ON_AVX2 else ("identity",)

# The largest ranks that the C++ passes multiply sooner in fp32 than the library, without and with a
# mask. Up to there one read of a tensor gains more than the library's inner loop (python -m
# benchmarks.rank_passes).
PLAIN_RANK, MASKED_RANK = (16, 32) if _ON_AVX2 else (MAX_RANK, MAX_RANK)

# The rows of x up to which the C++ multiplies by a frozen weight, sooner than the library's GEMM
# (python -m benchmarks.few_rows); at most kMaxFew of csrc/cpu/few.h
MAX_FEW = 32 if _ON_AVX2 else 8

cpp = native.ops()


def covers_rows(x: Tensor) -> bool:
    """Whether the C++ passes take a tensor of x's device, dtype and last stride."""
    ours = x.device.type == "cpu" and x.dtype in DTYPES and x.stride(-1) == 1 and x.numel() > 0
    return ours and native.why_missing() is None


def covers(x: Tensor, rank: int) -> bool:
    """Whether the C++ rank passes take an activation x (M, K) and a rank."""
    return covers_rows(x) and 1 <= rank <= MAX_RANK


def cpp_weight(tensor: Tensor | None) -> Tensor | None:
    """A trainable weight in the form that the C++ code reads."""
    if tensor is None or (tensor.dtype is torch.float32 and not torch.is_grad_enabled()):
        return tensor
    return tensor.detach().float()


def _by_library(x: Tensor, rank: int, seed: Tensor | None, covered: bool | None) -> bool:
    """Whether the library runs a rank product of x."""
    few = x.shape[0] <= FEW_ROWS or gemm.in_16_bits(x.dtype, x.device.type)
    if (seed is None and few) or rank < 1 or library_is_faster(x.dtype, rank, seed is not None):
        return True
    return not (covers_rows(x) if covered is None else covered)


@functools.cache
def library_is_faster(dtype: torch.dtype, rank: int, masked: bool) -> bool:
    """Whether the library multiplies a tensor by a factor of this rank sooner than the C++ passes,
    or these do not take the rank."""
    if dtype.itemsize != 4:
        return rank > MAX_RANK
    return rank > min(MAX_RANK, MASKED_RANK if masked else PLAIN_RANK)


def has_few_rows(x: Tensor) -> bool:
    """Whether C++ multiplies x (M, K) by a frozen weight: M is that of a decoder's step."""
    return x.shape[0] <= MAX_FEW and covers_rows(x)


def reads_few(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`few_linear` reads this weight for a few rows x."""
    return weight.dtype is x.dtype and 1 in weight.stride()


def few_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weightᵀ + bias of a few rows, in C++."""
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    cpp.few_rows_product_(out, x, weight.t(), bias)
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weightᵀ + bias (M, N), in ``out`` if given.

    A product of few rows takes as long as reading the weight. The C++ code reads it once, in the
    order of its memory, whether its rows or its columns are contiguous. The library's GEMM takes
    longer.
    """
    if has_few_rows(x) and reads_few(x, weight):
        return few_linear(x, weight, bias, out)
    if gemm.runs_in_fp32(x.dtype, x.device.type):
        return gemm.product_in_fp32(x, weight.t(), out, bias)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def add_product(base: Tensor, x: Tensor, w: Tensor, scale: float, out: Tensor | None) -> Tensor:
    """base + scale x w, in ``out`` if given; it may be ``base``."""
    if gemm.runs_in_fp32(x.dtype, x.device.type):
        return gemm.product_in_fp32(x, w, out, base, scale)
    return torch.addmm(base, x, w, alpha=scale, out=out)


def activate(
    name: str,
    t: Tensor,
    out: Tensor | None = None,
    *,
    linear: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    covered: bool | None = None,
) -> Tensor:
    """drop(f(t) * linear), t (M, N), in ``out`` if given, else as a new contiguous tensor.

    ``out`` may be t or ``linear``. If it is ``linear``, t may be overwritten too.
    """
    if out is None:
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
    alone = linear is None and seed is None
    slower = (alone and name in LIBRARY_IS_FASTER) or (name == "gelu" and t.element_size() == 2)
    if not slower and (covers_rows(t) if covered is None else covered):
        mask = NO_MASK if seed is None else cpp_mask(p, seed)
        return cpp.activate_(out, t, linear, ACTIVATIONS.index(name), *mask)
    if linear is None:
        library_activate(name, t, out)
        return out if seed is None else drop_(out, p, seed)
    over_linear = out.data_ptr() == linear.data_ptr()
    torch.mul(library_activate(name, t, t if over_linear else out), linear, out=out)
    return drop_(out, p, seed)


def library_activate(name: str, t: Tensor, out: Tensor) -> Tensor:
    """f(t), in ``out``, by torch."""
    aten = torch.ops.aten
    if name == "relu":
        return torch.clamp_min(t, 0, out=out)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu.out(t, approximate="tanh" if name == "gelu_tanh" else "none", out=out)
    if name == "silu":
        return aten.silu.out(t, out=out)
    if name == "tanh":
        return torch.tanh(t, out=out)
    return out.copy_(t)


def down(
    x: Tensor, a: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """s = drop(x) aᵀ + bias with one read of x and no masked copy of it."""
    low, rank = x.dtype, a.shape[0]
    if not _by_library(x, rank, seed, None):
        s, mask = x.new_empty(x.shape[0], rank), NO_MASK if seed is None else cpp_mask(p, seed)
        return cpp.rank_down_(s, x, cpp_weight(a), cpp_weight(bias), *mask)
    a, bias = a.to(low), None if bias is None else bias.to(low)
    if seed is None:
        return linear(x, a, bias)
    s = x.new_empty(x.shape[0], rank)
    for rows in row_blocks(x):
        factor = drop_factor(rows, x.shape[1], p, seed, low)
        linear(factor.mul_(x[rows]), a, None, s[rows])
    return s if bias is None else s.add_(bias)


def up(
    base: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    in_place: bool = False,
    covered: bool | None = None,
) -> Tensor:
    """drop(base) + scale (h bᵀ + bias), over ``base`` if it may be overwritten."""
    low = base.dtype
    out = base if in_place else torch.empty_like(base, memory_format=torch.contiguous_format)
    if not _by_library(base, b.shape[1], seed, covered) and h.stride(-1) == 1:
        mask = NO_MASK if seed is None else cpp_mask(p, seed)
        return cpp.rank_up_(out, base, h, cpp_weight(b), cpp_weight(bias), scale, *mask)
    b = b.to(low).t()
    if seed is not None:
        bias = None if bias is None else bias.to(low) * scale
        for rows in row_blocks(base):
            block = torch.mul(base[rows], drop_factor(rows, base.shape[1], p, seed, low),
                              out=out[rows])  # fmt: skip
            block = block if bias is None else block.add_(bias)
            block.addmm_(h[rows], b, alpha=scale)
        return out
    if bias is not None:
        # the bias is added in the copy of base, which the accumulating GEMM needs anyway
        start = torch.add(base, bias.to(low), alpha=scale, out=out)
        return add_product(start, h, b, scale, out)
    return add_product(base, h, b, scale, out)


def takes_few(x: Tensor, adapter: Bottleneck) -> bool:
    """Whether :func:`few_update` takes x and these weights."""
    down, down_bias, up, up_bias = adapter
    dtype = down.dtype
    if up.dtype is not dtype or down.stride(1) != 1 or up.stride(1) != 1 or dtype not in DTYPES:
        return False
    for bias in (down_bias, up_bias):
        if bias is not None and (bias.dtype is not dtype or bias.stride(0) != 1):
            return False
    return down.shape[0] > 0 and has_few_rows(x)


def few_update(
    base: Tensor,
    x: Tensor,
    adapter: Bottleneck,
    scale: float,
    activation: str = "identity",
    t: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """base + scale (f(x Dᵀ + d) Uᵀ + u) of a few rows (:func:`takes_few`) in one call: a decoder's
    step, whose calls take longer than its products. ``t`` (M, R) receives x Dᵀ + d. Rows of
    ``base`` that are not contiguous are copied."""
    out = base
    if not in_place:
        base = base if base.stride(1) == 1 else base.contiguous()
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if torch.is_grad_enabled():
        adapter = Bottleneck(*(None if w is None else w.detach() for w in adapter))
    down, down_bias, up, up_bias = adapter
    cpp.few_rows_update_(
        out, t, base, x, down, down_bias, up, up_bias, scale, ACTIVATIONS.index(activation)
    )
    return out


def stacked_linear(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    packed: Tensor | None,
) -> Tensor:
    """The pre-activations (M, F + R or 2 F + R) of a widened block, [gate | in | down]: one GEMM if
    the weights are packed. Columns of padding may then follow."""
    stack = [(ffn.in_weight, ffn.in_bias), (adapter.down_weight, adapter.down_bias)]
    if ffn.gate_weight is not None:
        stack.insert(0, (ffn.gate_weight, ffn.gate_bias))
    if packed is not None:
        padding = packed.shape[0] - sum(weight.shape[0] for weight, _ in stack)
        parts = [(bias, weight.shape[0]) for weight, bias in stack] + [(None, padding)]
        return linear(x, packed, _stacked_bias(parts, x))
    pre = x.new_empty(x.shape[0], sum(weight.shape[0] for weight, _ in stack))
    inputs = [x] * (len(stack) - 1) + [x if adapter_x is None else adapter_x]
    first = 0
    for (weight, bias), source in zip(stack, inputs):
        part = pre[:, first : first + weight.shape[0]]
        linear(source, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), part)
        first += weight.shape[0]
    return pre


def _stacked_bias(parts: list[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    """The concatenated biases, zeros for a missing one; None if all are missing."""
    if all(bias is None for bias, _ in parts):
        return None
    return torch.cat([like.new_zeros(n) if b is None else b.to(like.dtype) for b, n in parts])


def activation_buffer(pre: Tensor, inner: int, rank: int, gated: bool, keep_pre: bool) -> Tensor:
    """The tensor for [A | H | padding]: the pre-activations if no later step reads them."""
    if not keep_pre:
        return pre[:, inner:] if gated else pre
    return pre.new_empty(pre.shape[0], inner + rank)


def summed_bias(
    out_bias: Tensor | None, up_bias: Tensor | None, scale: float, low: torch.dtype
) -> Tensor | None:
    """b2 + s u in ``low``; None if both are missing."""
    if up_bias is None:
        return out_bias
    if out_bias is None:
        return up_bias.to(low) * scale
    return torch.add(out_bias, up_bias, alpha=scale, out=torch.empty_like(out_bias, dtype=low))


def packed_product(act: Tensor, packed_out: Tensor, bias: Tensor | None) -> Tensor:
    """[A | H] [W2 | s U]ᵀ + bias; columns of either past F + R are zeros."""
    width = min(act.shape[1], packed_out.shape[1])
    return linear(act[:, :width], packed_out[:, :width], bias)


def out_projection(
    act: Tensor,
    inner: int,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    packed_out: Tensor | None,
    scale: float,
    output_drop: Dropout,
    *,
    covered: bool,
) -> Tensor:
    """drop(A W2ᵀ + b2) + s (H Uᵀ + u), A and H the columns of ``act``."""
    p, seed = output_drop
    up_weight, up_bias, rank = adapter.up_weight, adapter.up_bias, adapter.up_weight.shape[1]
    if seed is None and packed_out is not None:
        bias = summed_bias(ffn.out_bias, up_bias, scale, act.dtype)
        return packed_product(act[:, : inner + rank], packed_out, bias)
    a, h = act[:, :inner], act[:, inner : inner + rank]
    if seed is None:
        y = linear(a, ffn.out_weight, summed_bias(ffn.out_bias, up_bias, scale, act.dtype))
        return up(y, h, up_weight, scale=scale, in_place=True, covered=covered)
    y = linear(a, ffn.out_weight, ffn.out_bias)
    return up(
        y, h, up_weight, up_bias, scale, p=p, seed=seed, in_place=True, covered=covered
    )  # fmt: skip
