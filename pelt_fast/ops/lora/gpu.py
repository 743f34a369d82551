"""LoRA on a GPU: the library runs the frozen GEMM, Triton the rank update.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation. The sums include the frozen GEMM's
         own 2 P each way. The kernels state their workspaces.
         forward   x for S, y read and written by rank_up:                         5 P
         backward  dy for dS and dB together, x for dA, dx read and written:       6 P
         With dropout the mask is made once in backward, as bits: P / 16, written once, read twice.
If ``config.LORA_PLANS`` has a tail plan, our own GEMM adds the rank update: 2 P less each way.
Above the ranks of ``config.fused_rank`` the product is large enough for the library's GEMM.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.config import fused_rank, lora_plan, one_pass_kernel, processors
from pelt_fast.kernels.mask import mask_bits
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.rank_update import rank_update
from pelt_fast.kernels.tail_gemm import tail_gemm
from pelt_fast.ops.common import native_cuda
from pelt_fast.ops.common.bundles import Dropout, FrozenLinear, LowRank, absent
from pelt_fast.ops.common.dropout import keep_scale
from pelt_fast.ops.common.gradients import weight_gradient


def lora_forward(
    x: Tensor, linear: FrozenLinear, factors: LowRank, drop: Dropout
) -> tuple[Tensor, Tensor]:
    (weight, bias), (lora_a, lora_b, scale), (dropout_p, seed) = linear, factors, drop
    rank = lora_a.shape[0]
    if seed is None and rank > fused_rank("rank_down", x.device):
        s = x @ lora_a.to(x.dtype).t()
    else:
        s, _ = rank_down(x, lora_a, dropout_p=dropout_p, seed=seed)
    plan = tail_plan(x, weight, rank)
    if plan == "tail_cuda":
        return cuda_tail_gemm(x, weight, s, lora_b, scale=scale, bias=bias), s
    if plan != "accumulate":
        descriptors = plan == "tail_descriptor"
        tail = dict(scale=scale, bias=bias, descriptors=descriptors)
        return tail_gemm(x, weight.t(), s, lora_b.t(), **tail), s
    return rank_update(s, lora_b, F.linear(x, weight, bias), scale=scale, in_place=True), s


def tail_plan(x: Tensor, weight: Tensor, rank: int) -> str:
    """The plan of the table, if its kernel takes the input."""
    plan = lora_plan(rank, x.device)
    if plan == "tail_cuda" and not native_cuda.covers_tail(x, weight, rank):
        return "accumulate"
    return plan


def one_pass_by_cuda(dy: Tensor, rank: int) -> bool:
    """Whether the table's kernel for dS and dB is the CUDA C++ one and takes the input."""
    return one_pass_kernel(dy.device) == "cuda" and native_cuda.covers_one_pass(dy, rank)


def lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    factors: LowRank,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    lora_a, (dropout_p, seed) = factors.lora_a, drop
    dx = da = None
    ds, db = _up_gradients(dy, s, factors, needs)
    plan, bits = tail_plan(dy, weight, lora_a.shape[0]), None
    needs_bits = needs[0] and (needs[1] or plan == "tail_cuda")
    if seed is not None and needs_bits and lora_a.shape[1] % 8 == 0:
        bits = mask_bits(seed, dropout_p, dy.shape[0], lora_a.shape[1])
    if needs[0]:
        dx = _input_gradient(dy, ds, weight, lora_a, plan, drop, bits)
    if needs[1]:
        if seed is None and lora_a.shape[0] > fused_rank("rank_down_bwd", dy.device):
            da = weight_gradient(ds, x, lora_a.dtype)
        else:
            mask = dict(dropout_p=dropout_p, seed=seed, bits=bits)
            da, _ = rank_down_bwd(ds, x, lora_a.dtype, **mask)
    return tuple(absent(dy) if grad is None else grad for grad in (dx, da, db))


def _up_gradients(
    dy: Tensor, s: Tensor, factors: LowRank, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dS (M, R), if dx or dA needs it, and dB."""
    _, lora_b, scale = factors
    rank, need_ds = lora_b.shape[1], needs[0] or needs[1]
    if need_ds and needs[2] and one_pass_by_cuda(dy, rank):
        ds, db, _ = cuda_rank_up_gradients(dy, s, lora_b, scale=scale)
        return ds, db
    if rank > fused_rank("rank_up_bwd", dy.device):
        db = weight_gradient(dy, s, lora_b.dtype).mul_(scale) if needs[2] else None
        return (dy @ lora_b.to(dy.dtype)).mul_(scale) if need_ds else None, db
    if not (need_ds or needs[2]):
        return None, None
    return rank_up_bwd(dy, s, lora_b, scale=scale, need_dt=need_ds, need_db=needs[2])[:2]


def _input_gradient(
    dy: Tensor,
    ds: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    plan: str,
    drop: Dropout,
    bits: Tensor | None,
) -> Tensor:
    """dx = dy W + drop(dS A)."""
    dropout_p, seed = drop
    if plan == "tail_cuda":
        mask = dict(dropout_p=dropout_p, bits=bits)
        return cuda_tail_gemm(dy, weight, ds, lora_a, transposed=True, **mask)
    if plan != "accumulate":
        mask = dict(dropout_p=dropout_p, seed=seed, bits=bits)
        return tail_gemm(dy, weight, ds, lora_a, descriptors=plan == "tail_descriptor", **mask)
    dx = dy @ weight
    if seed is None and lora_a.shape[0] > fused_rank("rank_up", dy.device):
        return dx.addmm_(ds, lora_a.to(dy.dtype))
    rank_up(ds, lora_a.t(), dx, out=dx, update_dropout_p=dropout_p, seed=seed, bits=bits)
    return dx


def cuda_tail_gemm(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    transposed: bool = False,
    dropout_p: float = 0.0,
    bits: Tensor | None = None,
) -> Tensor:
    """The CUDA C++ kernel (csrc/cuda/tail_gemm.cu): x weightᵀ + bias + drop(scale s uᵀ), ``weight``
    (N, K), u (N, R); ``transposed``: x weight + drop(scale s u), ``weight`` (K, N), u (R, N).
    ``bits`` (M, N / 8) is the mask. A factor in fp32 is scaled, then cast."""
    width = weight.shape[1] if transposed else weight.shape[0]
    out = x.new_empty(x.shape[0], width)
    u = (u.float() * scale if scale != 1.0 else u).to(x.dtype).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    kept = 1.0 if bits is None else keep_scale(dropout_p)
    return native_cuda.ops().tail_gemm_(
        out, x, weight, s.contiguous(), u, bias, bits, kept, transposed, processors(x.device)
    )


def cuda_rank_up_gradients(
    dy: Tensor, h: Tensor, up_weight: Tensor, *, scale: float, need_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The CUDA C++ kernel (csrc/cuda/rank_backward.cu): dh = s dy U (M, R) in dy's dtype,
    dU = s dyᵀ h and du = s Σ dy in ``up_weight``'s, from one read of dy."""
    rows, rank = dy.shape[0], up_weight.shape[1]
    dh = dy.new_empty(rows, rank)
    d_up = dy.new_empty(up_weight.shape, dtype=torch.float32)
    d_bias = dy.new_empty(dy.shape[1], dtype=torch.float32) if need_bias else None
    native_cuda.ops().rank_backward_(
        dy, h.contiguous(), up_weight.to(dy.dtype).contiguous(), scale, dh, d_up, d_bias,
        processors(dy.device),
    )  # fmt: skip
    wide = up_weight.dtype
    return dh, d_up.to(wide), None if d_bias is None else d_bias.to(wide)
