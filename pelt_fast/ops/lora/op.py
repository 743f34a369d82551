"""LoRA's ops: schemas, fakes and autograd's Function."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    Dropout,
    FrozenLinear,
    LowRank,
    absent,
    unflatten,
)
from pelt_fast.ops.common.dropout import draw_seeds, seed_row
from pelt_fast.ops.common.library import Op, OpFunction, keep_needed, run

from . import cpu, reference

GPU = "pelt_fast.ops.lora.gpu"


def _forward_fake(x, linear: FrozenLinear, factors: LowRank, drop: Dropout):
    return x.new_empty(x.shape[0], linear.weight.shape[0]), x.new_empty(
        x.shape[0], factors.lora_a.shape[0]
    )


def _backward_fake(dy, x, s, weight, factors: LowRank, drop: Dropout, needs: Sequence[bool]):
    return (
        dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else absent(dy),
        torch.empty_like(factors.lora_a) if needs[1] else absent(dy),
        torch.empty_like(factors.lora_b) if needs[2] else absent(dy),
    )


lora_fwd = Op("lora_fwd", reference.lora_forward, _forward_fake)
lora_bwd = Op("lora_bwd", reference.lora_backward, _backward_fake)
lora_fwd.on_cpu(cpu.lora_forward)
lora_bwd.on_cpu(cpu.lora_backward)
for _op, _name in ((lora_fwd, "lora_forward"), (lora_bwd, "lora_backward")):
    _op.on_gpu(f"{GPU}:{_name}", "lora", size=("lora_a", 0), any_strides=("weight",))

lora_step = cpu.lora_step

_arguments = unflatten(Tensor, FrozenLinear, LowRank, Dropout)


class LoRALinearFunction(OpFunction):
    """y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ on x (M, K).

    Saves x if A (or an unfrozen W) needs a gradient, and S (M, R) if B does. Otherwise it keeps
    only references to the parameters.
    """

    @staticmethod
    def forward(ctx, *args):
        x, linear, factors, drop = _arguments(*args)
        backend = active.name
        y, s = lora_fwd(*args, backend=backend)
        _, linear_needs, needs, _ = _arguments(*ctx.needs_input_grad)
        keeps_x = needs.lora_a or linear_needs.weight
        ctx.save_for_backward(
            x if keeps_x else None, s if needs.lora_b else None, linear.weight, factors.lora_a,
            factors.lora_b, drop.seed,
        )  # fmt: skip
        ctx.settings = (factors.scale, drop.dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, lora_a, lora_b, seed = ctx.saved_tensors
        scale, dropout_p, backend = ctx.settings
        need_x, linear_needs, factor_needs, _ = _arguments(*ctx.needs_input_grad)
        needs = [need_x, factor_needs.lora_a, factor_needs.lora_b]
        dy = dy.contiguous()
        grads = lora_bwd(
            dy, absent(dy) if x is None else x, absent(dy) if s is None else s, weight, lora_a,
            lora_b, scale, dropout_p, seed, needs, backend=backend,
        )  # fmt: skip
        dx, da, db = keep_needed(grads, needs)
        d_weight = dy.t() @ x if linear_needs.weight else None
        d_bias = dy.sum(0) if linear_needs.bias else None
        return dx, d_weight, d_bias, da, db, None, *NOTHING[Dropout]

    @staticmethod
    def infer(*args):
        return lora_fwd(*args, backend=active.name)[0]


def lora(
    x: Tensor, linear: FrozenLinear, factors: LowRank, dropout_p: float, training: bool
) -> Tensor:
    """LoRA on x (..., K). The arguments were checked; the dropout's seed is drawn here."""
    seed = draw_seeds(x, training, dropout_p)
    drop = Dropout(dropout_p, seed_row(seed, 0, dropout_p))
    y = run(LoRALinearFunction, x.reshape(-1, x.shape[-1]), *linear, *factors, *drop)
    return y.view(*x.shape[:-1], y.shape[-1])
