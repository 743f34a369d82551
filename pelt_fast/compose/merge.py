"""merge and unmerge: fold what is linear into the base's own weights.

LoRA         W <- W + s B A                                        (paper equation 6)
adapter      of no activation behind a projection: W <- W + s U D W, b <- b + s (U (D b + d) + u)
parallel FFN adapter whose activation is the block's: [W1; D], [W2 | s U], on request

A folded site stays where it is and lets its projection run alone; what the projection held is kept
beside it, so that unmerge gives it back bit for bit.
"""

import torch
from torch import Tensor, nn

from pelt_fast.injection.folded_weights import set_back, set_parameter, unfold
from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import Injection, Site, injection_of
from pelt_fast.injection.shared_weights import holders_of, refuse_shared
from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules import (
    LoRALinear,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialAdapter,
)
from pelt_fast.modules.frozen_module import QUANTISED
from pelt_fast.modules.hooked import is_away
from pelt_fast.modules.projection_view import ProjectionView

from .reload import say


def merge(model: nn.Module, *, widen_ffn: bool = False, keep_base: bool = True) -> nn.Module:
    """Fold every site that can be folded, in evaluation the same function; returns the model.

    ``widen_ffn`` also folds parallel adapters whose activation is the block's own into a wider
    block. The products are made in fp32 (at least) and rounded once. ``keep_base=False`` keeps no
    copy of what was overwritten: unmerge then refuses, and when every site was folded the model is
    a plain one again, whose config says its biases and widths: what save_pretrained writes loads as
    the same model. The copy that is kept is moved and cast with the model. Raises ValueError,
    before anything is changed, when nothing can be folded, a weight to fold into is read in another
    place as well, no config can say what ``keep_base=False`` would leave, or the model is merged
    already.
    """
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    if injection.merged:
        raise ValueError(f"this {type(model).__name__} is merged already: unmerge it first")
    reasons = {site.name: why_not(site, widen_ffn) for site in injection.sites}
    folded = [site for site in injection.sites if reasons[site.name] is None]
    if not folded:
        found = sorted({reason for reason in reasons.values() if reason})
        raise ValueError(
            f"nothing of {injection.config.name!r} can be merged:"
            f" {'; '.join(found) or 'it has no sites'}"
        )
    whole = len(folded) == len(injection.sites) and not keep_base
    holders = holders_of(model)
    for parameter in (p for site in folded for p in _written(site)):
        refuse_shared(holders, parameter)
    before = []
    with torch.no_grad():
        for site in folded:  # in the order they run: an adapter folds into what its LoRA made
            before += [set_parameter(module, name, value) for module, name, value in _folded(site)]
    if whole:
        try:
            _let_the_config_say(model, before)
        except ValueError:
            set_back(before)
            raise
        _remove(model, injection)
        return handle
    for site in folded:
        site.module.merged = True
    injection.merged = [site.name for site in folded]
    injection.before.overwritten = before if keep_base else []
    return handle


def _written(site: Site) -> list[nn.Parameter]:
    """The parameters that folding a site writes into."""
    module = site.module
    if isinstance(module, ParallelFFNAdapter):
        linears = [module.ffn.in_proj.module, module.ffn.out_proj.module]
    else:
        linears = [module.frozen.module]
    names = ("weight",) if isinstance(module, LoRALinear) else ("weight", "bias")
    holders = [linear.owner if isinstance(linear, ProjectionView) else linear for linear in linears]
    found = (getattr(holder, name) for holder in holders for name in names)
    return [parameter for parameter in found if parameter is not None]


def _let_the_config_say(model: nn.Module, before: list[tuple]) -> None:
    """Where a merge changed a name or a shape: ``model.config`` says it from here on."""
    pairs = [(value, getattr(module, name)) for module, name, value in before]
    if all(old is not None and old.shape == new.shape for old, new in pairs):
        return
    widths = {}
    for old, new in pairs:
        if old is not None:
            widths |= {a: b for a, b in zip(old.shape, new.shape) if a != b}
    say(model, widths)


def unmerge(model: nn.Module) -> nn.Module:
    """Take :func:`merge` back: the base's weights bit for bit, the sites at work; returns the
    model. Raises ValueError when nothing is merged or no copy was kept."""
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    if not injection.merged:
        raise ValueError(f"this {type(model).__name__} is not merged")
    unfold(injection)
    return handle


def why_not(site: Site, widen_ffn: bool) -> str | None:
    """The reason a site cannot be folded, or None."""
    module = site.module
    if isinstance(module, LoRALinear):
        return _why_not_read(module, "LoRA on")
    if isinstance(module, SequentialAdapter):
        if module.activation != "identity" or module.layer_norm != "none":
            return "an adapter with an activation or a LayerNorm is not linear"
        if isinstance(module.frozen.module, ProjectionView) and module.frozen.module.bias is None:
            return "a projection that shares its matrix has no place for a bias"
        return _why_not_read(module, "a projection with")
    if isinstance(module, ResidualFFNAdapter):
        return "the adapter reads the residual stream, the block its norm"
    if isinstance(module, ParallelFFNAdapter):
        if not widen_ffn:
            return "a parallel FFN adapter is folded on request (widen_ffn=True)"
        if module.ffn.gate_proj is not None:
            return "a gated block multiplies, an adapter does not: it cannot be widened by one"
        if module.activation != module.ffn.activation or module.layer_norm != "none":
            return (
                f"the block's activation is {module.ffn.activation}, the adapter's"
                f" {module.activation}"
            )
        if any(
            isinstance(projection.module, ProjectionView) for projection in module.ffn.projections
        ):
            return "a block whose matrices are fused or lie transposed (Conv1D) cannot grow"
        return module.ffn.why_not_fused()
    return f"{site.form} on this place is not linear"


def _why_not_read(module: nn.Module, what: str) -> str | None:
    """Why nothing can be folded into a layer's weight, or None."""
    linear, reason = module.frozen.module, module.frozen.why_not_read()
    if reason == QUANTISED:
        return f"{what} a quantised weight"
    if is_away(linear):
        return f"{what} an offloaded weight (take accelerate's hooks off first)"
    if reason is not None:
        return f"{what} a layer that does more: {reason}"
    holder = linear.owner if isinstance(linear, ProjectionView) else linear
    return None if "weight" in holder._parameters else f"{what} a weight that is computed"


def _folded(site: Site) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, parameter, value) of a folded site."""
    module = site.module
    if isinstance(module, LoRALinear):
        linear = module.frozen.module
        update = module.scale * _wide(module.lora_b) @ _wide(module.lora_a)
        return [(linear, "weight", _rounded(_wide(linear.weight) + update, linear.weight))]
    if isinstance(module, SequentialAdapter):
        return _linear_adapter(module)
    module.unpack()
    scale = _column(module.scale)
    first, last = module.ffn.in_proj.module, module.ffn.out_proj.module
    up = _rounded(_wide(module.up_weight) * scale, last.weight)
    down_bias, up_bias = module.down_bias, _wide(module.up_bias).view(-1, 1) * scale
    out_bias = up_bias.view(-1) if last.bias is None else _wide(last.bias) + up_bias.view(-1)
    in_bias = first.weight.new_zeros(first.weight.shape[0]) if first.bias is None else first.bias
    down = module.down_weight.to(first.weight.dtype)
    return [
        (first, "weight", torch.cat([first.weight, down])),
        (first, "bias", torch.cat([in_bias, down_bias.to(in_bias.dtype)])),
        (last, "weight", torch.cat([last.weight, up], 1)),
        (last, "bias", _rounded(out_bias, last.weight)),
    ]


def _linear_adapter(module: SequentialAdapter) -> list[tuple[nn.Module, str, Tensor]]:
    linear = module.frozen.module
    down, d, up, u = map(_wide, module.weights)
    scale = _column(module.scale)
    up, u = up * scale, (u.view(-1, 1) * scale).view(-1)
    weight = _wide(linear.weight)
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else _wide(linear.bias)
    keep = 1.0 if module.residual else 0.0
    return [
        (linear, "weight", _rounded(keep * weight + up @ (down @ weight), linear.weight)),
        (linear, "bias", _rounded(keep * bias + up @ (down @ bias + d) + u, linear.weight)),
    ]


def _column(scale: float | Tensor) -> float | Tensor:
    """A scale that multiplies rows: a number, or learned, scalar or per channel."""
    return scale.detach().reshape(-1, 1) if isinstance(scale, Tensor) else scale


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _rounded(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)


def _remove(model: nn.Module, injection: Injection) -> None:
    """Take the sites out; the task head stays as it was trained."""
    injection.changes.undo()
    trainable = injection.trainable_before
    for name, parameter in parameters_of(model).items():
        beside = f"{name.rpartition('.')[0]}.weight"  # of a bias that a merge made
        parameter.requires_grad_(trainable.get(name, trainable.get(beside, True)))
    del model._pelt
