"""merge and unmerge: fold linear updates into the base's own weights.

LoRA         W <- W + s B A                                    (paper, equation 6; docs/maths.md#i2)
adapter      without activation, after a projection: W <- W + s U D W, b <- b + s (U (D b + d) + u)
parallel FFN adapter whose activation is the block's: [W1; D], [W2 | s U], on request
                                                                              (docs/maths.md#i3)

The site of a folded method stays in its module and lets the projection run alone. The weights that
were overwritten are kept, so that unmerge restores them bit for bit.
"""

import torch
from torch import Tensor, nn

from pelt_fast.config.word_values import flag
from pelt_fast.injection.disabled import refuse_disabled
from pelt_fast.injection.folded_weights import Overwritten, set_back, set_parameter, unfold
from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import Injection, Site, injection_of, refuse_together
from pelt_fast.injection.shared_weights import holders_of, refuse_shared
from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules import LoRALinear, ParallelFFNAdapter
from pelt_fast.modules.projection_view import ProjectionView

from .config_after_merge import describe
from .folded_values import folded_values
from .why_not_merged import why_not


def merge(model: nn.Module, *, widen_ffn: bool = False, keep_base: bool = True) -> nn.Module:
    """Fold every site that can be folded into the base's weights.

    In evaluation mode the model computes the same function afterwards. The products are made in
    fp32 at least, and rounded once. The copy of the overwritten weights is moved and cast with the
    model.

    Args:
        model: a model with a method, or a wrapper of one.
        widen_ffn: also fold parallel adapters whose activation is the block's own, into a wider
            block.
        keep_base: keep a copy of the overwritten weights. With False, unmerge is not possible. If
            every site was folded, the model is then a plain one. Its config describes its biases
            and widths, so that save_pretrained and from_pretrained give the same model.

    Returns:
        ``model``.

    Raises:
        TypeError: ``widen_ffn`` or ``keep_base`` is not true or false.
        ValueError: nothing can be folded; the model is merged already; another module reads a
            weight that would be written; or no config can describe what ``keep_base=False`` would
            leave. The model is unchanged.

    Example:
        pelt_fast.inject(model, "lora")
        pelt_fast.merge(model.eval())
    """
    flag("widen_ffn", widen_ffn)
    flag("keep_base", keep_base)
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    refuse_disabled(injection, "merge")
    refuse_together(injection, "merge")
    folded = _sites_to_fold(model, injection, widen_ffn)
    before: list[Overwritten] = []
    with torch.no_grad():
        for site in folded:  # in the order they run: LoRA first, then an adapter
            before += [set_parameter(*written) for written in folded_values(site)]
    if len(folded) == len(injection.sites) and not keep_base:
        _make_plain(model, injection, before)
        return handle
    for site in folded:
        site.module.merged = True
    injection.merged = [site.name for site in folded]
    injection.before.overwritten = before if keep_base else []
    return handle


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: the base has its weights again, bit for bit, and every site runs again.

    Args:
        model: a merged model, or a wrapper of one.

    Returns:
        ``model``.

    Raises:
        ValueError: the model is not merged, no copy of the base was kept, or its weights were
            offloaded since.

    Example:
        pelt_fast.unmerge(pelt_fast.merge(model))
    """
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    if not injection.merged:
        raise ValueError(f"this {type(model).__name__} is not merged")
    unfold(injection)
    return handle


def _sites_to_fold(model: nn.Module, injection: Injection, widen_ffn: bool) -> list[Site]:
    """The sites that can be folded; ValueError when there is none, or one must not be."""
    if injection.merged:
        raise ValueError(f"this {type(model).__name__} is merged already: unmerge it first")
    reasons = {site.name: why_not(site, widen_ffn) for site in injection.sites}
    folded = [site for site in injection.sites if reasons[site.name] is None]
    if not folded:
        texts = sorted({reason for reason in reasons.values() if reason})
        raise ValueError(
            f"nothing of {injection.config.name!r} can be merged:"
            f" {'; '.join(texts) or 'it has no sites'}"
        )
    holders = holders_of(model)
    for parameter in (p for site in folded for p in _written(site)):
        refuse_shared(holders, parameter)
    return folded


def _written(site: Site) -> list[nn.Parameter]:
    """The parameters that folding a site writes."""
    module = site.module
    if isinstance(module, ParallelFFNAdapter):
        linears = [module.ffn.in_proj.module, module.ffn.out_proj.module]
    else:
        linears = [module.frozen.module]
    names = ("weight",) if isinstance(module, LoRALinear) else ("weight", "bias")
    holders = [linear.owner if isinstance(linear, ProjectionView) else linear for linear in linears]
    parameters = (getattr(holder, name) for holder in holders for name in names)
    return [parameter for parameter in parameters if parameter is not None]


def _make_plain(model: nn.Module, injection: Injection, before: list[Overwritten]) -> None:
    """Remove the sites of a model that is folded whole. The task head stays as it was trained."""
    try:
        _describe_in_config(model, before)
    except ValueError:
        set_back(before)
        raise
    injection.changes.undo()
    trainable = injection.trainable_before
    for name, parameter in parameters_of(model).items():
        weight = f"{name.rpartition('.')[0]}.weight"  # of the layer whose bias a merge made
        parameter.requires_grad_(trainable.get(name, trainable.get(weight, True)))
    del model._pelt


def _describe_in_config(model: nn.Module, before: list[Overwritten]) -> None:
    """Change ``model.config`` where a merge made a new parameter, or another shape."""
    pairs: list[tuple[Tensor | None, Tensor]] = [
        (value, getattr(module, name)) for module, name, value in before
    ]
    if all(old is not None and old.shape == new.shape for old, new in pairs):
        return
    widths = {}
    for old, new in pairs:
        if old is not None:
            widths |= {a: b for a, b in zip(old.shape, new.shape) if a != b}
    describe(model, widths)
