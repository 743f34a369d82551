"""The products with a small rank that the low-rank plans are made of.

Shapes   x, base, dx (M, K) or (M, N); a (R, K); b (N, R); s, h, ds, dh (M, R).
In C++ (csrc/cpu/rank_down.cpp, rank_up.cpp) each is one pass over its large tensors, the dropout
mask made in registers; without it the library's GEMMs do them, under a mask in blocks of rows.
Products that round to 16 bits and draw no mask are the library's in any case: it multiplies 16-bit
numbers, the C++ fp32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops import native

from .blocks import drop_factor, row_blocks, weight_gradient


def _by_library(x: Tensor, rank: int, seed: Tensor | None) -> bool:
    return not native.covers(x, rank) or (seed is None and x.element_size() == 2)


def down(
    x: Tensor, a: Tensor, bias: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """s = drop(x) aᵀ + bias with one read of x and no masked copy of it."""
    low, rank = x.dtype, a.shape[0]
    if not _by_library(x, rank, seed):
        s = x.new_empty(x.shape[0], rank)
        return native.ops().rank_down_(
            s, x, native.weight(a), native.weight(bias), *native.mask(p, seed)
        )
    a, bias = a.to(low), None if bias is None else bias.to(low)
    if seed is None:
        return F.linear(x, a, bias)
    s = x.new_empty(x.shape[0], rank)
    for rows in row_blocks(x):
        factor = drop_factor(rows, x.shape[1], p, seed, low)
        torch.mm(factor.mul_(x[rows]), a.t(), out=s[rows])
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
) -> Tensor:
    """drop(base) + scale (h bᵀ + bias), over ``base`` where it is ours to write to."""
    low = base.dtype
    out = base if in_place else torch.empty_like(base, memory_format=torch.contiguous_format)
    if not _by_library(base, b.shape[1], seed) and h.stride(-1) == 1:
        mask = native.mask(p, seed)
        return native.ops().rank_up_(
            out, base, h, native.weight(b), native.weight(bias), scale, *mask
        )
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
        # the bias rides on the copy of base that the accumulating GEMM needs anyway
        return torch.add(base, bias.to(low), alpha=scale, out=out).addmm_(h, b, alpha=scale)
    return torch.addmm(base, h, b, alpha=scale, out=out)


def up_gradients(
    dy: Tensor,
    h: Tensor | None,
    b: Tensor,
    scale: float,
    *,
    need_dh: bool,
    need_bias: bool,
    dh: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh = s dy b in dy's dtype; db = s dyᵀ h (with ``h``) and the bias' gradient in b's, from one
    read of dy. None for what is not asked for; ``dh`` may be given to be written to."""
    db = d_bias = None
    if not need_dh:
        dh = None
    elif dh is None:
        dh = dy.new_empty(dy.shape[0], b.shape[1])
    if native.covers(dy, b.shape[1]) and (h is None or h.stride(-1) == 1):
        db = None if h is None else dy.new_empty(b.shape, dtype=torch.float32)
        d_bias = dy.new_empty(b.shape[0], dtype=torch.float32) if need_bias else None
        weight = native.weight(b) if need_dh else None
        native.ops().rank_up_backward_(dy, h, weight, scale, dh, db, d_bias)
        return dh, *(None if d is None else d.to(b.dtype) for d in (db, d_bias))
    if h is not None:
        db = weight_gradient(dy, h, b.dtype).mul_(scale)
    if need_bias:
        d_bias = dy.sum(0, dtype=b.dtype).mul_(scale)
    if need_dh:
        torch.mm(dy, b.to(dy.dtype), out=dh).mul_(scale)
    return dh, db, d_bias


def down_gradients(
    ds: Tensor,
    x: Tensor | None,
    a: Tensor,
    base: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    need_dx: bool,
    need_da: bool,
    in_place: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = base + drop(ds a), over ``base`` where it is ours, and da = dsᵀ drop(x) in a's dtype;
    one mask for both. None for what is not asked for; ``x`` is read for da alone."""
    like, (rank, width) = x if need_da else ds, a.shape
    ours = native.covers(like, rank) and ds.stride(-1) == 1
    if seed is not None and not ours:
        return _masked_gradients(ds, x, a, base, p, seed, need_dx, need_da)
    dx = da = None
    if need_dx and (not ours or _by_library(like, rank, seed)):
        dx, need_dx = _input_gradient(ds, a.to(ds.dtype), base, in_place), False
    if not ours:
        return dx, weight_gradient(ds, x, a.dtype) if need_da else None
    if need_dx:
        dx = base if in_place else ds.new_empty(ds.shape[0], width)
    if need_da:
        da = ds.new_empty(rank, width, dtype=torch.float32)
    if need_dx or need_da:
        native.ops().rank_down_backward_(
            ds, x if need_da else None, native.weight(a) if need_dx else None,
            base if need_dx else None, dx if need_dx else None, da, *native.mask(p, seed),
        )  # fmt: skip
    return dx, None if da is None else da.to(a.dtype)


def _input_gradient(ds: Tensor, a: Tensor, base: Tensor | None, in_place: bool) -> Tensor:
    """base + ds a by the library's GEMM."""
    if base is None:
        return ds @ a
    return base.addmm_(ds, a) if in_place else torch.addmm(base, ds, a)


def _masked_gradients(ds, x, a, base, p, seed, need_dx, need_da):
    low, wide = a.to(ds.dtype), torch.promote_types(ds.dtype, a.dtype)
    dx = base if need_dx else None  # LoRA's, in place: nobody else draws a mask here
    da = torch.zeros_like(a, dtype=wide) if need_da else None
    for rows in row_blocks(ds, a.shape[1]):
        factor = drop_factor(rows, a.shape[1], p, seed, ds.dtype)
        if need_dx:
            dx[rows].addcmul_(ds[rows] @ low, factor)
        if need_da:
            da.addmm_(ds[rows].t().to(wide), factor.mul_(x[rows]).to(wide))
    return dx, None if da is None else da.to(a.dtype)
