"""Passes over large tensors, backward: the counterparts of ``passes``.

Shapes   x, dx (M, K); dy (M, N); a (R, K); b (N, R); h, ds, dh, t (M, R).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import gemm
from .activations import ACTIVATIONS
from .bundles import Dropout, FFNMatrices, Transform
from .dropout import cpp_mask, drop_, drop_factor, row_blocks
from .passes import (
    LIBRARY_IS_FASTER,
    NO_MASK,
    activate,
    add_product,
    covers_rows,
    cpp,
    cpp_weight,
    library_is_faster,
)


def fill(grads: list[Tensor], indices: Sequence[int], values: Iterable[Tensor | None]) -> None:
    """Put the computed gradients at their indices."""
    for index, value in zip(indices, values, strict=True):
        if value is not None:
            grads[index] = value


def product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x w, in ``out`` if given."""
    if gemm.runs_in_fp32(x.dtype, x.device.type):
        return gemm.product_in_fp32(x, w, out)
    return x @ w if out is None else torch.mm(x, w, out=out)


def weight_gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` (P, Q) of left (M, P) and right (M, Q), accumulated in at least ``dtype``.

    The result of low-precision activations is not rounded, and they are not cast as a whole: CUDA's
    GEMM writes fp32; elsewhere one block of rows at a time is cast.
    """
    wide = torch.promote_types(left.dtype, dtype)
    if wide == left.dtype and not gemm.runs_in_fp32(left.dtype, left.device.type):
        return (left.t() @ right).to(dtype)
    if gemm.writes_fp32(left.device.type) and dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=dtype)
    wide = torch.promote_types(wide, torch.float32)
    out = torch.zeros(left.shape[1], right.shape[1], dtype=wide, device=left.device)
    for rows in row_blocks(left, left.shape[1] + right.shape[1]):
        out.addmm_(left[rows].to(wide).t(), right[rows].to(wide))
    return out.to(dtype)


def activation_backward(
    name: str,
    grad: Tensor,
    t: Tensor,
    *,
    linear: Tensor | None = None,
    dt: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    covered: bool | None = None,
) -> Tensor:
    """drop(grad) f'(t), written over ``grad``. ``covered`` as in ``passes``.

    For a gated unit, ``dt`` gets drop(grad) linear f'(t), and ``grad`` becomes drop(grad) f(t), the
    gradient of ``linear``.
    """
    alone = linear is None and seed is None
    slower = alone and name in LIBRARY_IS_FASTER
    if not slower and (covers_rows(t) if covered is None else covered):
        mask = NO_MASK if seed is None else cpp_mask(p, seed)
        return cpp.activate_backward_(grad, t, linear, dt, ACTIVATIONS.index(name), *mask)
    if seed is not None:
        drop_(grad, p, seed)
    if linear is None:
        return library_backward(name, grad, t)
    library_backward(name, torch.mul(grad, linear, out=dt), t)
    return grad.mul_(activate(name, t, covered=covered))


def library_backward(name: str, grad: Tensor, t: Tensor) -> Tensor:
    """grad f'(t), written over ``grad``, by torch."""
    aten = torch.ops.aten
    if name == "relu":
        aten.threshold_backward.grad_input(grad, t, 0, grad_input=grad)
    elif name == "gelu":
        aten.gelu_backward.grad_input(grad, t, approximate="none", grad_input=grad)
    elif name == "gelu_tanh":
        aten.gelu_backward.grad_input(grad, t, approximate="tanh", grad_input=grad)
    elif name == "silu":
        aten.silu_backward.grad_input(grad, t, grad_input=grad)
    elif name == "tanh":
        aten.tanh_backward.grad_input(grad, torch.tanh(t), grad_input=grad)
    return grad


def up_gradients(
    dy: Tensor,
    h: Tensor | None,
    b: Tensor,
    scale: float,
    *,
    need_dh: bool,
    need_bias: bool,
    dh: Tensor | None = None,
    covered: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh = s dy b in dy's dtype; db = s dyᵀ h (with ``h``) and the bias' gradient in b's, from one
    read of dy. None for a gradient that is not requested. ``dh`` may be a tensor to write to."""
    db = d_bias = None
    if not need_dh:
        dh = None
    elif dh is None:
        dh = dy.new_empty(dy.shape[0], b.shape[1])
    rank = b.shape[1]
    covered = covers_rows(dy) if covered is None else covered
    covered = covered and rank > 0 and not library_is_faster(dy.dtype, rank, False)
    if covered and (h is None or h.stride(-1) == 1):
        db = None if h is None else dy.new_empty(b.shape, dtype=torch.float32)
        d_bias = dy.new_empty(b.shape[0], dtype=torch.float32) if need_bias else None
        weight = cpp_weight(b) if need_dh else None
        cpp.rank_up_backward_(dy, h, weight, scale, dh, db, d_bias)
        return dh, *(None if d is None else d.to(b.dtype) for d in (db, d_bias))
    if h is not None:
        db = weight_gradient(dy, h, b.dtype).mul_(scale)
    if need_bias:
        d_bias = dy.sum(0, dtype=b.dtype).mul_(scale)
    if need_dh:
        product(dy, b.to(dy.dtype), dh).mul_(scale)
    return dh, db, d_bias


def bottleneck_gradients(
    dy: Tensor,
    t: Tensor,
    up_weight: Tensor,
    transform: Transform,
    *,
    need_dt: bool,
    need_db: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dt (M, R) = s drop(dy U) f'(t), and the gradients of up_weight and up_bias; None for a
    gradient that is not needed."""
    name, scale, p, seed = transform
    h = activate(name, t, p=p, seed=seed) if need_db else None
    dt, d_up, d_up_bias = up_gradients(
        dy, h, up_weight, scale, need_dh=need_dt, need_bias=need_bias
    )
    if need_dt:
        dt = activation_backward(name, dt, t, p=p, seed=seed)
    return dt, d_up, d_up_bias


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
    covered: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = base + drop(ds a), over ``base`` if it may be overwritten, and da = dsᵀ drop(x) in a's
    dtype; one mask for both. None for a gradient that is not requested. Only da reads ``x``."""
    like, (rank, width) = x if need_da else ds, a.shape
    covered = covers_rows(like) if covered is None else covered
    takes = covered and rank > 0 and not library_is_faster(like.dtype, rank, seed is not None)
    ours = takes and ds.stride(-1) == 1
    if seed is not None and not ours:
        dx = _started(ds, width, base, in_place) if need_dx else None
        return _masked_gradients(ds, x, a, dx, Dropout(p, seed), need_da)
    dx = da = None
    if need_dx and (not ours or (seed is None and gemm.in_16_bits(like.dtype, like.device.type))):
        dx, need_dx = _input_gradient(ds, a.to(ds.dtype), base, in_place), False
    if not ours:
        return dx, weight_gradient(ds, x, a.dtype) if need_da else None
    if need_dx:
        dx = base if in_place else ds.new_empty(ds.shape[0], width)
    if need_da:
        da = ds.new_empty(rank, width, dtype=torch.float32)
    if need_dx or need_da:
        cpp.rank_down_backward_(
            ds, x if need_da else None, cpp_weight(a) if need_dx else None,
            base if need_dx else None, dx if need_dx else None, da,
            *(NO_MASK if seed is None else cpp_mask(p, seed)),
        )  # fmt: skip
    return dx, None if da is None else da.to(a.dtype)


def _input_gradient(ds: Tensor, a: Tensor, base: Tensor | None, in_place: bool) -> Tensor:
    """base + ds a by the library's GEMM."""
    if base is None:
        return product(ds, a)
    return add_product(base, ds, a, 1.0, base if in_place else None)


def _started(ds: Tensor, width: int, base: Tensor | None, in_place: bool) -> Tensor:
    """The tensor to which the update of dx is added: ``base``, a copy of it, or zeros."""
    if base is None:
        return ds.new_zeros(ds.shape[0], width)
    return base if in_place else base.clone(memory_format=torch.contiguous_format)


def _masked_gradients(ds, x, a, dx: Tensor | None, mask: Dropout, need_da: bool):
    """The same by the library's GEMMs, with the mask of one block of rows at a time. The update is
    added to ``dx``, None if it is not requested."""
    low, wide = a.to(ds.dtype), torch.promote_types(ds.dtype, a.dtype)
    da = torch.zeros_like(a, dtype=wide) if need_da else None
    for rows in row_blocks(ds, a.shape[1]):
        factor = drop_factor(rows, a.shape[1], mask.dropout_p, mask.seed, ds.dtype)
        if dx is not None:
            dx[rows].addcmul_(product(ds[rows], low), factor)
        if need_da:
            da.addmm_(ds[rows].t().to(wide), factor.mul_(x[rows]).to(wide))
    return dx, None if da is None else da.to(a.dtype)


def stacked_input_gradient(
    d_pre: Tensor, weights: FFNMatrices, packed: Tensor | None, separate: bool
) -> Tensor:
    """[dG | dZ | dT] times the stacked weights: one GEMM if they are packed. If the adapter reads a
    ``separate`` tensor, dT is left out."""
    if packed is not None and not separate:
        return product(d_pre, packed)
    stack = [weights.in_weight]
    if weights.gate_weight is not None:
        stack.insert(0, weights.gate_weight)
    if not separate:
        stack.append(weights.down_weight.to(d_pre.dtype))
    first = stack[0].shape[0]
    dx = product(d_pre[:, :first], stack[0])
    for weight in stack[1:]:
        add_product(dx, d_pre[:, first : first + weight.shape[0]], weight, 1.0, dx)
        first += weight.shape[0]
    return dx
