"""The CUDA C++ kernels (csrc/cuda/) in the shapes the fused plans call: small weights may be fp32
beside 16-bit activations; they are cast, scaled, and given as the kernels read them."""

import torch
from torch import Tensor

from pelt_fast.kernels.config import processors
from pelt_fast.ops import native_cuda
from pelt_fast.reference.philox import keep_scale


def tail_gemm(
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
    """x weightᵀ + bias + drop(scale s uᵀ), ``weight`` (N, K), u (N, R); ``transposed``: x weight +
    drop(scale s u), ``weight`` (K, N), u (R, N). ``bits`` (M, N / 8) is the mask."""
    width = weight.shape[1] if transposed else weight.shape[0]
    out = x.new_empty(x.shape[0], width)
    u = (u.float() * scale if scale != 1.0 else u).to(x.dtype).contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    kept = 1.0 if bits is None else keep_scale(dropout_p)
    return native_cuda.ops().tail_gemm_(
        out, x, weight, s.contiguous(), u, bias, bits, kept, transposed, processors(x.device)
    )


def rank_up_gradients(
    dy: Tensor, h: Tensor, up_weight: Tensor, *, scale: float, need_bias: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dh = s dy U (M, R) in dy's dtype, dU = s dyᵀ h and du = s Σ dy in ``up_weight``'s, from one
    read of dy."""
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
