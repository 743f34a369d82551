"""The second stage of every two-stage reduction: out = epilogue(s · Σ_j parts[j]).

Shapes   parts (J, P, Q) fp32, out (P, Q); t (P, Q) with the derivative, bias (Q).
Maths    v = s Σ_j parts[j] + bias, j ascending: the same bits every time
         out = v;  out and h = drop(f(v));  or out = drop(v) f'(t)
         groups: up to three such sums without an epilogue, one launch: the same bits as three
         routed: v of a method is the sum of the parts of its own rows
Traffic  reads J P Q of fp32, writes P Q. The parts are mostly still in the L2 cache.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import column_sums, derivative, fold, keep_tile, store_rank
from pelt_fast.kernels.config import cdiv, warps
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox

BLOCK_ROWS, BLOCK_COLUMNS = 8, 128
PAIR_BLOCK = 256
# a thread sums four numbers: accesses of 16 bytes, and as many threads as there can be
GROUPS, GROUP_THREADS = 3, 128
GROUP_BLOCK = 4 * GROUP_THREADS


@launched
@triton.jit
def reduce_parts_kernel(
    parts_ptr,
    bias_ptr,
    t_ptr,
    seed_ptr,
    out_ptr,
    h_ptr,
    scale,
    threshold,
    keep_scale,
    J,
    P,
    Q,
    stride_tp,
    stride_op,
    stride_hp,
    HAS_BIAS: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_DERIVATIVE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = tl.program_id(1) * BLOCK_Q
    columns = first + tl.arange(0, BLOCK_Q)
    mask = (rows < P)[:, None] & (columns < Q)[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    place = parts_ptr + rows[:, None] * Q + columns[None, :]
    for _ in range(0, J):
        acc += tl.load(place, mask=mask, other=0.0)
        place += tl.cast(P, tl.int64) * Q
    acc *= tl.cast(scale, tl.float32)
    kept = tl.cast(keep_scale, tl.float32)
    if HAS_DERIVATIVE:
        if DROP:
            keep = keep_tile(seed_ptr, rows, first, Q, threshold, ALIGNED, BLOCK_Q)
            acc = tl.where(keep, acc * kept, 0.0)
        t = tl.load(t_ptr + rows[:, None] * stride_tp + columns[None, :], mask=mask, other=0.0)
        acc *= derivative(t.to(tl.float32), ACTIVATION)
    store_rank(
        acc, bias_ptr, seed_ptr, out_ptr, h_ptr, rows, first, P, Q, threshold, kept,
        stride_op, stride_hp, HAS_BIAS, HAS_H, ACTIVATION, DROP, ALIGNED, BLOCK_Q,
    )  # fmt: skip


def reduce_parts(
    parts: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    t: Tensor | None = None,
    activation: str = "identity",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> None:
    """Write the sum over the first dim of ``parts`` to ``out``, with an optional epilogue:
    ``h`` receives drop(f(out)); ``t`` multiplies by f'(t) after the mask."""
    J, P, Q = parts.shape
    if out.numel() == 0:
        return
    grid = (cdiv(P, BLOCK_ROWS), cdiv(Q, BLOCK_COLUMNS))
    reduce_parts_kernel[grid](
        parts, bias, t, seed, out, h,
        scale, philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        J, P, Q, 0 if t is None else t.stride(0), out.stride(0), 0 if h is None else h.stride(0),
        HAS_BIAS=bias is not None, HAS_H=h is not None, HAS_DERIVATIVE=t is not None,
        ACTIVATION=activation, DROP=seed is not None, ALIGNED=Q % 8 == 0,
        BLOCK_P=BLOCK_ROWS, BLOCK_Q=BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def reduce_block(
    parts_ptr,
    out_ptr,
    block,
    scale,
    J,
    N,
    Q,
    stride_op,
    STRIDED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of the elements of out = scale Σ_j parts[j], both read as (N) each."""
    offs = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, J, BLOCK_J):
        # j ascending, and several loads in flight: none waits for the sum before
        for i in tl.static_range(BLOCK_J):
            j = tl.cast(start + i, tl.int64)
            acc += tl.load(parts_ptr + j * N + offs, mask=inside & (j < J), other=0.0)
    acc *= tl.cast(scale, tl.float32)
    place = out_ptr + (offs // Q * stride_op + offs % Q if STRIDED else offs)
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def reduce_groups_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    first_out_ptr,
    second_out_ptr,
    third_out_ptr,
    scale,
    first_j,
    second_j,
    third_j,
    first_n,
    second_n,
    third_n,
    Q,
    stride_op,
    COUNT: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # the programs of the groups one after another; out of the first has rows of Q, if STRIDED
    block = tl.program_id(0)
    blocks = tl.cdiv(first_n, BLOCK_N)
    if block < blocks:
        reduce_block(
            first_ptr, first_out_ptr, block, scale, first_j, first_n, Q, stride_op, STRIDED,
            BLOCK_J, BLOCK_N,
        )  # fmt: skip
    elif COUNT > 1:
        block -= blocks
        blocks = tl.cdiv(second_n, BLOCK_N)
        if block < blocks:
            reduce_block(
                second_ptr, second_out_ptr, block, scale, second_j, second_n, 1, 1, False,
                BLOCK_J, BLOCK_N,
            )  # fmt: skip
        elif COUNT > 2:
            reduce_block(
                third_ptr, third_out_ptr, block - blocks, scale, third_j, third_n, 1, 1, False,
                BLOCK_J, BLOCK_N,
            )  # fmt: skip


def reduce_groups(
    groups: Sequence[tuple[Tensor | None, Tensor | None]], *, scale: float = 1.0
) -> None:
    """Write scale Σ_j parts[j] to out for up to three pairs (parts, out), in one launch, the bits
    of :func:`reduce_parts`. A pair without parts is absent. ``parts`` (J, ...) and out are
    contiguous; the first pair's out, a matrix, may have any stride between its rows."""
    groups = [pair for pair in groups if pair[0] is not None and pair[1].numel()]
    if not groups:
        return
    parts, outs = zip(*groups, *[(None, None)] * (GROUPS - len(groups)))
    sizes = [0 if out is None else out.numel() for out in outs]
    strided = not outs[0].is_contiguous()
    row, stride = (outs[0].shape[1], outs[0].stride(0)) if strided else (1, 1)
    reduce_groups_kernel[(sum(cdiv(size, GROUP_BLOCK) for size in sizes),)](
        *parts, *outs, scale, *(0 if part is None else part.shape[0] for part in parts), *sizes,
        row, stride, COUNT=len(groups), STRIDED=strided,
        BLOCK_J=8, BLOCK_N=GROUP_BLOCK, num_warps=warps(GROUP_THREADS, outs[0].device),
    )  # fmt: skip


@launched
@triton.jit
def reduce_pair_kernel(
    parts_ptr, first_ptr, second_ptr, J, N, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pair = tl.zeros((2, BLOCK_N), tl.float32)  # of the even and of the odd parts
    for start in range(0, J, BLOCK_J):
        # BLOCK_J loads at a time: single loads would each wait for the one before
        j = start + tl.arange(0, BLOCK_J)
        place = parts_ptr + j.to(tl.int64)[:, None] * (2 * N) + offs[None, :]
        inside = (j < J)[:, None] & (offs < 2 * N)[None, :]
        pair += fold(tl.load(place, mask=inside, other=0.0), 2)
    acc = column_sums(pair)
    tl.store(first_ptr + offs, acc.to(first_ptr.dtype.element_ty), mask=offs < N)
    second = (offs >= N) & (offs < 2 * N)
    tl.store(second_ptr + offs - N, acc.to(second_ptr.dtype.element_ty), mask=second)


def reduce_pair(parts: Tensor, first: Tensor, second: Tensor) -> None:
    """Write the sums of parts[:, 0] and of parts[:, 1] to two contiguous tensors, in one launch.
    ``parts`` is (J, 2, ...) in fp32."""
    size = first.numel()
    if size == 0:
        return
    reduce_pair_kernel[(cdiv(2 * size, PAIR_BLOCK),)](
        parts, first, second, parts.shape[0], size, BLOCK_J=8, BLOCK_N=PAIR_BLOCK, num_warps=4,
    )  # fmt: skip


@launched
@triton.jit
def reduce_routed_kernel(
    parts_ptr,
    span_ptr,
    method_ptr,
    first_ptr,
    second_ptr,
    rows,
    each,
    heads,
    P,
    K,
    D,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program owns BLOCK_N elements of one head of one method, of both tensors
    g = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    first = tl.load(method_ptr + 2 * g)
    size = tl.load(method_ptr + 2 * g + 1) * D
    offs = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    whole = tl.cast(heads, tl.int64) * P * D
    a = tl.zeros((BLOCK_N,), tl.float32)
    b = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rows * each, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = j < rows * each
        span = span_ptr + 2 * (j // each)
        keys = tl.load(span + 1, mask=inside, other=0)
        mine = (tl.load(span, mask=inside, other=-1) == first) & (keys > 0)
        place = parts_ptr + j.to(tl.int64)[:, None] * (2 * whole) + head.to(tl.int64) * P * D
        place += offs[None, :]
        mask = mine[:, None] & (offs < size)[None, :]
        a += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        b += tl.sum(tl.load(place + whole, mask=mask, other=0.0), 0)
    to = (head.to(tl.int64) * K + first) * D + offs
    tl.store(first_ptr + to, a.to(first_ptr.dtype.element_ty), mask=offs < size)
    tl.store(second_ptr + to, b.to(second_ptr.dtype.element_ty), mask=offs < size)


def reduce_routed(
    parts: Tensor, spans: Tensor, methods: Tensor, first: Tensor, second: Tensor
) -> None:
    """:func:`reduce_pair` for the keys of many methods: ``parts`` (B each, 2, heads, P, D) of the
    batch's rows, whose keys ``spans`` (B, 2) names; each sum has the parts of its method's rows.
    ``first`` and ``second`` (heads, K, D) hold the keys of ``methods`` (G, 2) behind each other."""
    count, _, heads, P, D = parts.shape
    rows, K = spans.shape[0], first.shape[1]
    grid = (methods.shape[0] * heads, cdiv(P * D, PAIR_BLOCK))
    reduce_routed_kernel[grid](
        parts, spans, methods, first, second, rows, count // rows, heads, P, K, D,
        BLOCK_J=8, BLOCK_N=PAIR_BLOCK, num_warps=4,
    )  # fmt: skip
