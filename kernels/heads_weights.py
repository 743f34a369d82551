"""The weights of a prefix's tile and their gradients, recomputed in the backward kernels.

Shapes   q, do [BLOCK_T, BLOCK_D]; pk, pv [BLOCK_P, BLOCK_D]; lse, δ [BLOCK_T] fp32;
         w, dZ [BLOCK_T, BLOCK_P] fp32.
Maths    Z = scale q pkᵀ,  w = exp(Z - l) or relu(Z),  dW = drop(do pvᵀ)
         dZ = exp(Z - l) (dW - δ), relu: dW 1[Z > 0]
         An added softmax uses exp(Z - max) / Σ instead of exp(Z - l). The error of exp(x) is about
         x roundings, and where w is large Z - max is near 0, but Z - l is not
"""

import triton
import triton.language as tl

from pelt_fast.kernels.common import dot, keep_tile, load_rows


@triton.jit
def weight_gradients(
    q,
    do,
    pk,
    pv,
    lse,
    share,
    delta,
    rows,
    first_p,
    length,
    P,
    seed_ptr,
    scale,
    threshold,
    kept,
    FORM: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The dropped weights w and dZ of one tile [BLOCK_T, BLOCK_P], fp32, 0 past ``length``; the
    mask is P wide. For an added softmax, lse and share are what :func:`softmax_rows` returns."""
    zero = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    z = dot(q, tl.trans(pk), zero) * scale
    dw = dot(do, tl.trans(pv), zero)
    if FORM == "relu":
        w = tl.maximum(z, 0.0)
    else:
        valid = (first_p + tl.arange(0, BLOCK_P) < length)[None, :]
        w = tl.where(valid, tl.exp(z - lse[:, None]), 0.0)
        if FORM == "softmax":
            w *= share[:, None]
    dropped = w
    if DROP:
        keep = keep_tile(seed_ptr, rows, first_p, P, threshold, ALIGNED, BLOCK_P)
        dropped = tl.where(keep, w * kept, 0.0)
        dw = tl.where(keep, dw * kept, 0.0)
    dz = tl.where(z > 0, dw, 0.0) if FORM == "relu" else w * (dw - delta[:, None])
    return dropped, dz


@triton.jit
def softmax_rows(
    q,
    do,
    k_base,
    v_base,
    stride_kp,
    stride_vp,
    offs_d,
    rows,
    length,
    P,
    D,
    seed_ptr,
    scale,
    threshold,
    kept,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """max Z, 1 / Σ exp(Z - max) and δ = Σ_p w dW of the added softmax, not of the context."""
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    delta = tl.zeros((BLOCK_T,), tl.float32)
    zero = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for first in range(0, length, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        pk = load_rows(k_base, stride_kp, offs_p, length, offs_d, D).to(q.dtype)
        pv = load_rows(v_base, stride_vp, offs_p, length, offs_d, D).to(q.dtype)
        z = dot(q, tl.trans(pk), zero) * scale
        z = tl.where((offs_p < length)[None, :], z, float("-inf"))
        dw = dot(do, tl.trans(pv), zero)
        if DROP:
            keep = keep_tile(seed_ptr, rows, first, P, threshold, ALIGNED, BLOCK_P)
            dw = tl.where(keep, dw * kept, 0.0)
        higher = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - higher)
        w = tl.exp(z - higher[:, None])
        total = total * shrink + tl.sum(w, 1)
        delta = delta * shrink + tl.sum(w * dw, 1)
        top = higher
    return top, tl.div_rn(1.0, total), tl.div_rn(delta, total)
