"""The prefix part of prefix attention: backward.

Shapes   q, o, do, dq (B, H, T, D), any strides but the last 1; prefix_k, prefix_v (Hkv, P, D);
         lse (B, H, T) fp32: o and lse are the merged ones.
Maths    dW = drop(do pvᵀ);  dZ = exp(Z - l) (dW - δ), relu: dW 1[Z > 0]
         δ = Σ_d do o (gated), Σ_p w dW (softmax)
         dq += scale dZ pk,  dpk = scale Σ dZᵀ q,  dpv = Σ wᵀ do
Routed   as in ``heads``. dq of a row without keys stays as it is. dpk, dpv (Hkv, sum P, D) of a
         method are sums over its rows, zeros without rows.
Traffic  passes of B H T D: q, do, o, dq, dq 5 if P fits one block, else 2 more for each block.
         Workspace of the two-stage dpk, dpv: 8 J P D bytes, J = B H parts.  Flops 10 P D a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import dot, load_rows
from pelt_fast.kernels.config import cdiv, split
from pelt_fast.kernels.heads import blocks_of, form_of, own_span
from pelt_fast.kernels.heads_weights import softmax_rows, weight_gradients
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.reduce import reduce_pair, reduce_routed
from pelt_fast.ops.common import dropout as philox


@launched
@triton.jit
def prefix_bwd_kernel_dq(
    q_ptr,
    pk_ptr,
    pv_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    seed_ptr,
    span_ptr,
    dq_ptr,
    row_lse_ptr,
    delta_ptr,
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
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_dt,
    FORM: tl.constexpr,
    NEED_DQ: tl.constexpr,
    ROUTED: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # dq += of BLOCK_T queries over the whole prefix. The rows' l and δ are kept for dpk, dpv. For
    # an added softmax, max and 1 / Σ replace l, one plane each
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
    do = load_rows(do_ptr + b * stride_gb + h * stride_gh, stride_gt, offs_t, T, offs_d, D)
    k_base = pk_ptr + (h // group) * stride_kh
    v_base = pv_ptr + (h // group) * stride_vh
    if ROUTED:
        k_base += own_first * stride_kp
        v_base += own_first * stride_vp
    rows = offs_t if ROUTED and not DROP else head * T + offs_t  # read for a mask alone
    lse = tl.zeros((BLOCK_T,), tl.float32)
    share = tl.zeros((BLOCK_T,), tl.float32)
    delta = tl.zeros((BLOCK_T,), tl.float32)
    if FORM == "gated":
        lse = tl.load(lse_ptr + rows, mask=offs_t < T, other=0.0)
        o = load_rows(o_ptr + b * stride_ob + h * stride_oh, stride_ot, offs_t, T, offs_d, D)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    elif FORM == "softmax":
        lse, share, delta = softmax_rows(
            q, do, k_base, v_base, stride_kp, stride_vp, offs_d, rows, length, P, D, seed_ptr,
            scale, threshold, kept, DROP, ALIGNED, BLOCK_T, BLOCK_P,
        )  # fmt: skip
        if ROUTED:  # made here, beside its use: kept during the pass above it would spill on sm_80
            rows = head * T + offs_t
        plane = (tl.num_programs(0) // tiles).to(tl.int64) * T
        tl.store(row_lse_ptr + plane + rows, share, mask=offs_t < T)
    if FORM != "relu":
        tl.store(row_lse_ptr + rows, lse, mask=offs_t < T)
        tl.store(delta_ptr + rows, delta, mask=offs_t < T)
    if NEED_DQ:
        acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for first in range(0, length, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            pk = load_rows(k_base, stride_kp, offs_p, length, offs_d, D).to(q.dtype)
            pv = load_rows(v_base, stride_vp, offs_p, length, offs_d, D).to(q.dtype)
            _, dz = weight_gradients(
                q, do, pk, pv, lse, share, delta, rows, first, length, P, seed_ptr, scale,
                threshold, kept, FORM, DROP, ALIGNED, BLOCK_T, BLOCK_P,
            )  # fmt: skip
            acc = dot(dz.to(q.dtype), pk, acc)
        place = dq_ptr + b * stride_db + h * stride_dh + offs_t.to(tl.int64)[:, None] * stride_dt
        place += offs_d[None, :]
        inside = (offs_t < T)[:, None] & (offs_d < D)[None, :]
        dq = tl.load(place, mask=inside, other=0.0).to(tl.float32) + acc * scale
        tl.store(place, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def prefix_bwd_kernel(
    q_ptr,
    pk_ptr,
    pv_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    seed_ptr,
    span_ptr,
    dq_ptr,
    parts_ptr,
    scale,
    threshold,
    keep_scale,
    H,
    group,
    T,
    P,
    D,
    parts,
    part_t,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kh,
    stride_kp,
    stride_vh,
    stride_vp,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_dt,
    FORM: tl.constexpr,
    WHOLE: tl.constexpr,
    NEED_DQ: tl.constexpr,
    ROUTED: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program owns BLOCK_P prefix keys of one head and loops over a part of its queries. WHOLE:
    # the prefix fits the block; δ is made here, and dq in the same pass
    head = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    b, h = head // H, head % H
    length = P
    if ROUTED:
        own_first, length = own_span(span_ptr, b)
    first = tl.program_id(1) * BLOCK_P
    offs_p = first + tl.arange(0, BLOCK_P)
    offs_d = tl.arange(0, BLOCK_D)
    scale = tl.cast(scale, tl.float32)
    kept = tl.cast(keep_scale, tl.float32)
    k_base = pk_ptr + (h // group) * stride_kh
    v_base = pv_ptr + (h // group) * stride_vh
    if ROUTED:
        k_base += own_first * stride_kp
        v_base += own_first * stride_vp
    low = q_ptr.dtype.element_ty
    pk = load_rows(k_base, stride_kp, offs_p, length, offs_d, D).to(low)  # [BLOCK_P, BLOCK_D]
    pv = load_rows(v_base, stride_vp, offs_p, length, offs_d, D).to(low)
    dpk = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dpv = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    last = tl.minimum(T, (part + 1) * part_t)
    if ROUTED:  # no queries for keys past the last
        last = tl.where(first < length, last, 0)
    for start in range(part * part_t, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        rows = head * T + offs_t
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qt, offs_t, last, offs_d, D)
        do = load_rows(do_ptr + b * stride_gb + h * stride_gh, stride_gt, offs_t, last, offs_d, D)
        if NEED_DQ:
            place = dq_ptr + b * stride_db + h * stride_dh
            place += offs_t.to(tl.int64)[:, None] * stride_dt + offs_d[None, :]
            inside = (offs_t < last)[:, None] & (offs_d < D)[None, :]
            if not DROP:  # loaded early, beside the weights' work; a mask leaves too few registers
                dq = tl.load(place, mask=inside, other=0.0)
        lse = tl.zeros((BLOCK_T,), tl.float32)
        share = tl.zeros((BLOCK_T,), tl.float32)
        delta = tl.zeros((BLOCK_T,), tl.float32)
        if FORM == "softmax":
            plane = (tl.num_programs(0) // parts).to(tl.int64) * T
            share = tl.load(lse_ptr + plane + rows, mask=offs_t < last, other=0.0)
        if FORM != "relu":
            lse = tl.load(lse_ptr + rows, mask=offs_t < last, other=0.0)
            if WHOLE:
                o_base = o_ptr + b * stride_ob + h * stride_oh
                o = load_rows(o_base, stride_ot, offs_t, last, offs_d, D)
                delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            else:
                delta = tl.load(delta_ptr + rows, mask=offs_t < last, other=0.0)
        w, dz = weight_gradients(
            q, do, pk, pv, lse, share, delta, rows, first, length, P, seed_ptr, scale, threshold,
            kept, FORM, DROP, ALIGNED, BLOCK_T, BLOCK_P,
        )  # fmt: skip
        # queries past the last have q = do = 0 and add nothing, whatever their weights
        dpv = dot(tl.trans(w.to(low)), do, dpv)
        dpk = dot(tl.trans(dz.to(low)), q, dpk)
        if NEED_DQ:
            if DROP:
                dq = tl.load(place, mask=inside, other=0.0)
            update = dot(dz.to(low), pk, tl.zeros((BLOCK_T, BLOCK_D), tl.float32)) * scale
            tl.store(place, (dq.to(tl.float32) + update).to(low), mask=inside)
    # part j of kv head h // group: (b, h % group, part); dpk of every head, then dpv
    j = (b * group + h % group) * parts + part
    rows_of_all = H // group * P
    row = j * 2 * rows_of_all + h // group * P + offs_p
    inside = (offs_p < length)[:, None] & (offs_d < D)[None, :]
    place = parts_ptr + row[:, None] * D + offs_d[None, :]
    tl.store(place, dpk * scale, mask=inside)
    tl.store(place + tl.cast(rows_of_all, tl.int64) * D, dpv, mask=inside)


def prefix_merge_bwd(
    do: Tensor,
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    *,
    scale: float,
    form: str,
    composition: str,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    spans: Tensor | None = None,
    methods: Tensor | None = None,
    longest: int = 0,
) -> tuple[Tensor, Tensor]:
    """Add the prefix's part to ``dq`` in place (None: not needed); return dpk, dpv (Hkv, P, D) in
    the prefix's dtype. ``o`` and ``lse`` are the merged ones. ``methods`` (G, 2) beside ``spans``:
    the first key and the number of keys of each method, ``longest`` at most."""
    B, H, T, D = q.shape
    heads, P = prefix_k.shape[:2]
    dpk, dpv = (q.new_empty(heads, P, D, dtype=prefix_k.dtype) for _ in range(2))
    P = P if spans is None else longest
    if q.numel() == 0 or P == 0:
        return dpk.zero_(), dpv.zero_()
    table = "prefix_bwd" if seed is None else "prefix_bwd_dropped"
    tile, block_p, block_d = blocks_of(table, q, P)
    blocks_t, blocks_p = cdiv(T, tile.block_m), cdiv(P, block_p)
    part_blocks, parts = split(B * H * blocks_p, blocks_t, q.device, tile.programs)
    form = form_of(form, composition)
    whole = blocks_p == 1 and form != "softmax"  # l and δ need a pass over the prefix
    sizes = (
        scale,
        philox.threshold(dropout_p),
        philox.keep_scale(dropout_p),
        H,
        H // heads,
        T,
        P,
        D,
    )
    strides = (
        *q.stride()[:3], *prefix_k.stride()[:2], *prefix_v.stride()[:2], *o.stride()[:3],
        *do.stride()[:3], *((0, 0, 0) if dq is None else dq.stride()[:3]),
    )  # fmt: skip
    settings = dict(
        FORM=form, ROUTED=spans is not None, DROP=seed is not None, ALIGNED=P % 8 == 0,
        BLOCK_T=tile.block_m, BLOCK_P=block_p, BLOCK_D=block_d, **tile.launch,
    )  # fmt: skip
    delta = None
    if not whole:
        planes = 2 if form == "softmax" else 1  # max and 1 / Σ
        rows_lse, delta = lse.new_empty(planes, *lse.shape), torch.empty_like(lse)
        prefix_bwd_kernel_dq[(B * H * blocks_t,)](
            q, prefix_k, prefix_v, o, do, lse, seed, spans, dq, rows_lse, delta, *sizes, *strides,
            NEED_DQ=dq is not None, **settings,
        )  # fmt: skip
        lse = rows_lse
    count = B * (H // heads) * parts
    sums = torch.empty(count, 2, heads, P, D, dtype=torch.float32, device=q.device)
    prefix_bwd_kernel[(B * H * parts, blocks_p)](
        q, prefix_k, prefix_v, o, do, lse, delta, seed, spans, dq, sums, *sizes,
        parts, part_blocks * tile.block_m, *strides,
        WHOLE=whole, NEED_DQ=whole and dq is not None, **settings,
    )  # fmt: skip
    if spans is None:
        reduce_pair(sums, dpk, dpv)
    else:
        reduce_routed(sums, spans, methods, dpk, dpv)
    return dpk, dpv
