"""The activation of a feed-forward block whose projections are separate layers, one pass each way.

Shapes   z, gate, a, da, dz and d_gate (M, F), each with its own row stride; gate may be missing.
Maths    forward   a = drop(φ(z)), or drop(φ(gate) z)
         backward  dz = drop(da) φ'(z), or dz = drop(da) φ(gate) and d_gate = drop(da) z φ'(gate)
Traffic  forward   reads M F (gated 2), writes M F
         backward  reads 2 M F (gated 3), writes M F (gated 2)
         at 16 bytes a thread and access. Integer work of the masks: see ``common``.

The widened block has gate, in and down in one buffer, and the kernel of ``widened_ffn``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import activate, derivative, keep_tile
from pelt_fast.kernels.config import cdiv, pick
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox


@launched
@triton.jit
def ffn_act_fwd_kernel(
    z_ptr,
    gate_ptr,
    seed_ptr,
    a_ptr,
    threshold,
    keep_scale,
    M,
    F,
    stride_zm,
    stride_gm,
    stride_am,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(F, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_N
    columns = (first + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M)[:, None] & (columns < F)
    a = tl.load(z_ptr + rows[:, None] * stride_zm + columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        place = gate_ptr + rows[:, None] * stride_gm + columns
        a *= activate(tl.load(place, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    else:
        a = activate(a, ACTIVATION)
    if DROP:
        keep = keep_tile(seed_ptr, rows, first, F, threshold, ALIGNED, BLOCK_N)
        a = tl.where(keep, a * tl.cast(keep_scale, tl.float32), 0.0)
    place = a_ptr + rows[:, None] * stride_am + columns
    tl.store(place, a.to(a_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit
def ffn_act_bwd_kernel(
    da_ptr,
    z_ptr,
    gate_ptr,
    seed_ptr,
    dz_ptr,
    d_gate_ptr,
    threshold,
    keep_scale,
    M,
    F,
    stride_dam,
    stride_zm,
    stride_gm,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # dz and d_gate are new: their rows have F elements
    tiles = tl.cdiv(F, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_N
    columns = (first + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M)[:, None] & (columns < F)
    da = tl.load(da_ptr + rows[:, None] * stride_dam + columns, mask=mask, other=0.0)
    da = da.to(tl.float32)
    z = tl.load(z_ptr + rows[:, None] * stride_zm + columns, mask=mask, other=0.0).to(tl.float32)
    if DROP:
        keep = keep_tile(seed_ptr, rows, first, F, threshold, ALIGNED, BLOCK_N)
        da = tl.where(keep, da * tl.cast(keep_scale, tl.float32), 0.0)
    place = rows[:, None] * F + columns
    low = dz_ptr.dtype.element_ty
    if GATED:
        gate = tl.load(gate_ptr + rows[:, None] * stride_gm + columns, mask=mask, other=0.0)
        gate = gate.to(tl.float32)
        d_gate = da * z * derivative(gate, ACTIVATION)
        tl.store(d_gate_ptr + place, d_gate.to(low), mask=mask)
        tl.store(dz_ptr + place, (da * activate(gate, ACTIVATION)).to(low), mask=mask)
    else:
        tl.store(dz_ptr + place, (da * derivative(z, ACTIVATION)).to(low), mask=mask)


def ffn_act(
    z: Tensor,
    gate: Tensor | None,
    activation: str,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return a = drop(φ(z)) or drop(φ(gate) z), a new tensor (M, F)."""
    a = torch.empty_like(z, memory_format=torch.contiguous_format)
    M, F = z.shape
    if a.numel() == 0:
        return a
    tile = pick("widened_ffn", 8 * z.element_size(), 1, z.device)
    ffn_act_fwd_kernel[(cdiv(M, tile.block_m) * cdiv(F, tile.block_n),)](
        z, gate, seed, a, philox.threshold(dropout_p), philox.keep_scale(dropout_p), M, F,
        z.stride(0), 0 if gate is None else gate.stride(0), a.stride(0),
        GATED=gate is not None, ACTIVATION=activation, DROP=seed is not None,
        ALIGNED=F % 8 == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.launch,
    )  # fmt: skip
    return a


def ffn_act_bwd(
    da: Tensor,
    z: Tensor,
    gate: Tensor | None,
    activation: str,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return dz and d_gate (None without a gate), new tensors (M, F)."""
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    d_gate = None if gate is None else torch.empty_like(dz)
    M, F = z.shape
    if dz.numel() == 0:
        return dz, d_gate
    tile = pick("widened_ffn", 8 * z.element_size(), 1, z.device)
    ffn_act_bwd_kernel[(cdiv(M, tile.block_m) * cdiv(F, tile.block_n),)](
        da, z, gate, seed, dz, d_gate, philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        M, F, da.stride(0), z.stride(0), 0 if gate is None else gate.stride(0),
        GATED=gate is not None, ACTIVATION=activation, DROP=seed is not None,
        ALIGNED=F % 8 == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.launch,
    )  # fmt: skip
    return dz, d_gate
