"""The adapter's ops: schemas, fakes and autograd's Function."""

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    AdapterNorm,
    Bottleneck,
    Transform,
    absent,
    unflatten,
)
from pelt_fast.ops.common.dropout import draw_seeds, seed_row
from pelt_fast.ops.common.library import Op, OpFunction, fake_gradients, keep_needed, run

from . import cpu, reference

GPU = "pelt_fast.ops.adapter.gpu"


def _forward_fake(x, base, adapter: Bottleneck, norm, transform, keep_t: bool):
    y = x.new_empty(x.shape[0], adapter.up_weight.shape[0])
    t = x.new_empty(x.shape[0], adapter.down_weight.shape[0]) if keep_t else absent(x)
    return y, t


def _backward_fake(
    dy, x, t, adapter: Bottleneck, norm: AdapterNorm, transform, sequential, needs: Sequence[bool]
):
    down, up, weight = adapter.down_weight, adapter.up_weight, norm.norm_weight
    width, kind = ((), dy.dtype) if weight is None else (weight.shape, weight.dtype)
    shapes = (
        (x.shape, x.dtype), (down.shape, down.dtype), ((down.shape[0],), down.dtype),
        (up.shape, up.dtype), ((up.shape[0],), up.dtype), (width, kind), (width, kind),
    )  # fmt: skip
    return fake_gradients(dy, shapes, needs)


adapter_fwd = Op("adapter_fwd", reference.adapter_forward, _forward_fake)
adapter_bwd = Op("adapter_bwd", reference.adapter_backward, _backward_fake)
adapter_fwd.on_cpu(cpu.adapter_forward, reference.adapter_forward_in_blocks)
adapter_bwd.on_cpu(cpu.adapter_backward, reference.adapter_backward_in_blocks)
for _op, _name in ((adapter_fwd, "adapter_forward"), (adapter_bwd, "adapter_backward")):
    _op.on_gpu(f"{GPU}:{_name}", "adapter", size=("down_weight", 0))

adapter_step = cpu.adapter_step

_arguments = unflatten(Tensor, Tensor, Bottleneck, AdapterNorm, Transform)


class AdapterFunction(OpFunction):
    """y = base + out(s (drop(f(in(x) Dᵀ + d)) Uᵀ + u)); ``base=None`` is the sequential adapter.

    Saves x (for D and an adapter LayerNorm) and T (M, R).
    """

    @staticmethod
    def forward(ctx, *args):
        x, base, adapter, norm, transform = _arguments(*args)
        backend = active.name
        y, t = adapter_fwd(*args, True, backend=backend)
        _, _, needs, _, _ = _arguments(*ctx.needs_input_grad)
        keeps_x = needs.down_weight or norm.layer_norm == "in"
        ctx.save_for_backward(
            x if keeps_x else None, t, *adapter, norm.norm_weight, norm.norm_bias, transform.seed
        )
        ctx.settings = (norm.layer_norm, *transform[:-1])
        ctx.sequential, ctx.backend = base is None, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, t, down_weight, *small, seed = ctx.saved_tensors
        need_x, need_base, adapter_needs, norm_needs, _ = _arguments(*ctx.needs_input_grad)
        needs = [need_x, *adapter_needs, norm_needs.norm_weight, norm_needs.norm_bias]
        dy = dy.contiguous()
        # the replacement of an x that was not saved has x's shape and the storage of one row
        x = dy.new_empty(down_weight.shape[1]).expand(dy.shape[0], -1) if x is None else x
        grads = adapter_bwd(
            dy, x, t, down_weight, *small, *ctx.settings, seed, ctx.sequential, needs,
            backend=ctx.backend,
        )  # fmt: skip
        dx, *rest = keep_needed(grads, needs)
        return dx, dy if need_base else None, *rest, None, *NOTHING[Transform]

    @staticmethod
    def infer(*args):
        return adapter_fwd(*args, False, backend=active.name)[0]


def adapter(
    x: Tensor,
    base: Tensor | None,
    weights: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    training: bool,
) -> Tensor:
    """The adapter on x (..., K). The arguments were checked; the seed of ``transform`` is drawn
    here."""
    p = transform.dropout_p
    transform = transform._replace(seed=seed_row(draw_seeds(x, training, p), 0, p))
    shape = (x if base is None else base).shape
    base = None if base is None else base.reshape(-1, base.shape[-1])
    y = run(AdapterFunction, x.reshape(-1, x.shape[-1]), base, *weights, *norm, *transform)
    return y.view(shape)
