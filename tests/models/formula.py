"""A method in plain torch: hooks on a base without one add each site's update by its formula.

Dropouts of the method itself must be off; the base's own act where the base has them, which is
between the block and the hook that adds (evaluation, where the layer spells its block out).
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from pelt_fast.layouts.lookup import base_of
from pelt_fast.modules import (
    LoRALinear,
    ResidualFFNAdapter,
    SequentialAdapter,
    SequentialFFNAdapter,
)
from pelt_fast.modules.ffn import ParallelFFNAdapter
from pelt_fast.modules.projection_view import ProjectionView, host_of
from pelt_fast.ops.common.activations import activate
from pelt_fast.testing import compare


def plain(base: nn.Module, injected: nn.Module, dtype: torch.dtype | None = None):
    """A copy of ``base`` with the updates of ``injected``'s sites, and the tensors of the method
    by their names in ``injected``; ``dtype`` casts both."""
    twin = copy.deepcopy(base).requires_grad_(False)
    twin = twin if dtype is None else twin.to(dtype)
    names = {module: name for name, module in base_of(injected).named_modules()}
    own = {p: n for n, p in injected.named_parameters() if "pelt_" in n}
    leaves = {n: p.detach().clone().to(dtype or p.dtype).requires_grad_() for p, n in own.items()}
    for site in injected._pelt.sites:
        module = site.module
        if isinstance(module, ParallelFFNAdapter | SequentialFFNAdapter):
            ffn = module.ffn
            read, write = (ffn.in_proj.module, ffn.out_proj.module)
            if ffn.block is not None:
                read = write = ffn.block.module
            if isinstance(module, ResidualFFNAdapter):
                read = next(m for m in names if module.kept_input in m._forward_pre_hooks.values())
        elif isinstance(module, LoRALinear | SequentialAdapter):
            read = write = module.frozen.module
        else:
            raise TypeError(type(module))
        tensors = {n: leaves[own[p]] for n, p in module.named_parameters()}
        rows = write.rows if isinstance(write, ProjectionView) else None
        reader, writer = (
            base_of(twin).get_submodule(
                names[m.owner if isinstance(m, ProjectionView) else host_of(m)]
            )
            for m in (read, write)
        )
        hook = Added(module, tensors, rows)
        reader.register_forward_pre_hook(hook.catch)
        writer.register_forward_hook(hook.add)
    return twin, leaves


class Added:
    """The update of one site."""

    def __init__(self, site: nn.Module, tensors: dict, rows: slice | None):
        self.site, self.tensors, self.rows = site, tensors, rows
        self.x = None

    def catch(self, module, args):
        self.x = args[0]

    def add(self, module, args, y):
        site, t = self.site, self.tensors
        sequential = isinstance(site, SequentialAdapter | SequentialFFNAdapter)
        x = y if sequential else self.x
        if isinstance(site, LoRALinear):
            update = F.linear(F.linear(x, t["lora_a"].to(x.dtype)), t["lora_b"].to(x.dtype))
            update = site.scale * update
        else:
            x = x.to(y.dtype)
            t = {name: tensor.to(x.dtype) for name, tensor in t.items()}
            if site.layer_norm == "in":
                x = F.layer_norm(x, x.shape[-1:], t["norm.weight"], t["norm.bias"])
            inner = activate(site.activation, F.linear(x, t["down_weight"], t["down_bias"]))
            scale = t.get("scale", site.scale)
            update = scale * F.linear(inner, t["up_weight"], t["up_bias"])
        update = update.to(y.dtype)
        if self.rows is None:
            return y + update
        y = y.clone()
        y[..., self.rows] += update
        return y


def results(model: nn.Module, batch: dict, leaves: dict | None = None) -> dict:
    """Logits and the gradients of the method's tensors."""
    wanted = leaves
    if leaves is None:
        wanted = {n: p for n, p in model.named_parameters() if "pelt_" in n}
    out = model(**batch)
    grads = torch.autograd.grad(out.loss, list(wanted.values()))
    return {"logits": out.logits.detach(), **dict(zip(wanted, grads))}


def assert_is_the_formula(
    base: nn.Module, injected: nn.Module, batch: dict, gradients: bool = True
) -> None:
    """Logits and, unless told, gradients of ``injected`` are those of ``base`` with the updates
    added, by the budget that plain torch sets in the same dtype around fp64."""
    wide = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    same, exact = (
        results(twin, given, leaves)
        for (twin, leaves), given in (
            (plain(base, injected), batch),
            (plain(base, injected, torch.float64), wide),
        )
    )
    exact = exact if gradients else {"logits": exact["logits"]}
    verdict = compare(results(injected, batch), same, exact, base.dtype)
    assert verdict.ok, verdict
