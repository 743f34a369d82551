"""The prefix part of prefix attention, merged into a context attention: forward.

Shapes   q, o (B, H, T, D), any strides but the last 1; prefix_k, prefix_v (Hkv, P, D);
         context_o (B, H, T, D), context_lse (B, H, T or more); lse (B, H, T) fp32.
Maths    Z = scale q pkᵀ, l_p = logsumexp Z, w = drop(weights)
         gated    l = logaddexp(l_c, l_p),  o = exp(l_c - l) o_c + drop(exp(Z - l)) pv
         softmax  o = o_c + drop(exp(Z - l_p)) pv       relu  o = o_c + drop(relu Z) pv
         a row whose context is fully masked has l_c = -inf, and its o_c is not used
Routed   ``spans`` (B, 2) int64: the first key and the number of keys of each batch row's own prefix
         in pk, pv (Hkv, sum P, D). Without keys o = o_c, l = l_c. P is then the longest prefix, the
         width of the dropout mask.
Traffic  passes of B H T D: q, o_c, o 3.  Flops 4 P D a row: P / S of the context's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import dot, keep_tile, load_rows
from pelt_fast.kernels.config import SHORT, cdiv, padded, pick
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.tile import Tile
from pelt_fast.ops.common import dropout as philox


@triton.jit
def load_context(lse_base, o_base, stride, offs_t, T, offs_d, D):
    """The context's l and o of one tile."""
    lse = tl.load(lse_base + offs_t, mask=offs_t < T, other=0.0)
    return lse, load_rows(o_base, stride, offs_t, T, offs_d, D)


@triton.jit
def own_span(span_ptr, b):
    """The first key of batch row b's own prefix, and its length."""
    return tl.load(span_ptr + 2 * b), tl.load(span_ptr + 2 * b + 1).to(tl.int32)


@launched
@triton.jit
def prefix_fwd_kernel(
    q_ptr,
    pk_ptr,
    pv_ptr,
    context_o_ptr,
    context_lse_ptr,
    seed_ptr,
    span_ptr,
    o_ptr,
    lse_ptr,
    scale,
    threshold,
    keep_scale,
    H,
    group,
    T,
    P,
    D,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kp,
    stride_vh,
    stride_vp,
    stride_cb,
    stride_ch,
    stride_ct,
    stride_lb,
    stride_lh,
    stride_ob,
    stride_oh,
    stride_ot,
    FORM: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    ROUTED: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program owns BLOCK_T queries of one head of one batch row
    tiles = tl.cdiv(T, BLOCK_T)
    offs_t = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // H, head % H
    offs_d = tl.arange(0, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    kept = tl.cast(keep_scale, tl.float32)
    length = P
    if ROUTED:
        own_first, length = own_span(span_ptr, b)
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qt, offs_t, T, offs_d, D)
    if HAS_CONTEXT:
        context_base = context_o_ptr + b * stride_cb + h * stride_ch
        own_base = context_lse_ptr + b * stride_lb + h * stride_lh
        # loaded early, beside the prefix's work, where that leaves enough registers
        LATE: tl.constexpr = DROP or (ROUTED and q.dtype == tl.float32)
        if not LATE:
            own, context = load_context(own_base, context_base, stride_ct, offs_t, T, offs_d, D)
    k_base = pk_ptr + (h // group) * stride_kh
    v_base = pv_ptr + (h // group) * stride_vh
    if ROUTED:
        k_base += own_first * stride_kp
        v_base += own_first * stride_vp
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, length, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        pk = load_rows(k_base, stride_kp, offs_p, length, offs_d, D).to(q.dtype)
        pv = load_rows(v_base, stride_vp, offs_p, length, offs_d, D).to(q.dtype)
        z = dot(q, tl.trans(pk), tl.zeros((BLOCK_T, BLOCK_P), tl.float32)) * scale
        if FORM == "relu":
            w = tl.maximum(z, 0.0)  # keys past the last were loaded as 0
        else:
            z = tl.where((offs_p < length)[None, :], z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 1))
            shrink = tl.exp(top - higher)
            w = tl.exp(z - higher[:, None])
            total = total * shrink + tl.sum(w, 1)
            acc *= shrink[:, None]
            top = higher
        if DROP:
            keep = keep_tile(seed_ptr, head * T + offs_t, first, P, threshold, ALIGNED, BLOCK_P)
            w = tl.where(keep, w * kept, 0.0)
        acc = dot(w.to(q.dtype), pv, acc)
    inside = (offs_t < T)[:, None] & (offs_d < D)[None, :]
    if HAS_CONTEXT:
        if LATE:
            own, context = load_context(own_base, context_base, stride_ct, offs_t, T, offs_d, D)
        context = tl.where((own == float("-inf"))[:, None], 0.0, context.to(tl.float32))
    else:
        own = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        context = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if ROUTED:  # a row of none: any number that is finite, not used
        top = tl.where(length > 0, top, 0.0)
        total = tl.where(length > 0, total, 1.0)
    if FORM == "gated":
        prefix = top + tl.log(total)
        largest = tl.maximum(own, prefix)
        joint = largest + tl.log(tl.exp(own - largest) + tl.exp(prefix - largest))
        out = tl.exp(own - joint)[:, None] * context + tl.exp(top - joint)[:, None] * acc
        own = joint if not ROUTED else tl.where(length > 0, joint, own)
    elif FORM == "softmax":
        out = context + acc / total[:, None]
    else:
        out = context + acc
    if ROUTED and FORM != "relu":
        out = tl.where(length > 0, out, context)
    place = o_ptr + b * stride_ob + h * stride_oh + offs_t.to(tl.int64)[:, None] * stride_ot
    tl.store(place + offs_d[None, :], out.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + head * T + offs_t, own, mask=offs_t < T)


def form_of(form: str, composition: str) -> str:
    """FORM of the kernels: "gated", "softmax" or "relu"."""
    return "gated" if composition == "gated" else form


def blocks_of(table: str, q: Tensor, length: int) -> tuple[Tile, int, int]:
    """The tile of ``table``, the block of prefix keys and that of the head dim."""
    tile = pick(table, 8 * q.element_size(), padded(q.shape[-1]), q.device)
    return tile, min(padded(length), tile.block_n), padded(q.shape[-1])


def prefix_merge(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    context_o: Tensor | None,
    context_lse: Tensor | None,
    o: Tensor,
    *,
    scale: float,
    form: str,
    composition: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    spans: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """Write the attention over [prefix; context] to ``o`` and return its lse (B, H, T) fp32: the
    joint one if gated, the context's if added. Without a context, both context tensors are None.
    With ``spans`` each batch row has its own prefix of at most ``longest`` keys."""
    B, H, T, D = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return lse
    P = prefix_k.shape[1] if spans is None else longest
    tile, block_p, block_d = blocks_of("prefix_short" if P <= SHORT else "prefix", q, P)
    context = (0, 0, 0) if context_o is None else context_o.stride()[:3]
    lse_strides = (0, 0) if context_lse is None else context_lse.stride()[:2]
    prefix_fwd_kernel[(B * H * cdiv(T, tile.block_m),)](
        q, prefix_k, prefix_v, context_o, context_lse, seed, spans, o, lse,
        scale, philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        H, H // prefix_k.shape[0], T, P, D,
        *q.stride()[:3], *prefix_k.stride()[:2], *prefix_v.stride()[:2], *context, *lse_strides,
        *o.stride()[:3],
        FORM=form_of(form, composition), HAS_CONTEXT=context_o is not None,
        ROUTED=spans is not None, DROP=seed is not None,
        ALIGNED=P % 8 == 0, BLOCK_T=tile.block_m, BLOCK_P=block_p, BLOCK_D=block_d, **tile.launch,
    )  # fmt: skip
    return lse
