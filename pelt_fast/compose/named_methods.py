"""Several named methods in one model: one of them is active, or a weighted sum of them.

A sum costs one fused site of the whole rank (``method_sum``). New weights, or another method with
an equal config, are written into the existing tensors: nothing is compiled again.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.config.word_values import flag
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.formats.checkpoint import load, read_method
from pelt_fast.formats.method_tensors import copy_tensors, fold_banks, method_tensors
from pelt_fast.injection.class_layer import check_num_labels, new_class_tensors
from pelt_fast.injection.count import method_modules
from pelt_fast.injection.handles import carrier_of, elsewhere, refuse_second
from pelt_fast.injection.inject import eject, inject
from pelt_fast.injection.record import injection_of
from pelt_fast.injection.values_before import Follower
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import is_method, modules_of, parameters_of, unwrapped
from pelt_fast.modules.hooked import at_hand, holders
from pelt_fast.presets import method as preset

from .method_sum import UPDATE, Kept, sum_config, sum_tensors
from .together import activate_together, are_together, classes_of, put_together

_CHILD = "pelt_named_methods"  # the child of the model that holds the named methods


@dataclasses.dataclass
class _Target:
    """What set_active makes of the model: a config, its tensors, and whether it trains."""

    config: PeltConfig
    tensors: dict[str, Tensor]
    trains: bool


class NamedMethods(Follower):
    """The named methods of one model, and the weights of the active ones. It is a child of the
    model, so that it is copied, pickled, moved and cast with the model."""

    def __init__(self, layout: Layout | None, pack: bool):
        super().__init__()
        self.options = dict(layout=layout, pack=pack)
        self.kept: dict[str, Kept] = {}
        self.weights: dict[str, float] = {}

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        for name, kept in self.kept.items():
            trained, plain = (
                {key: fn(tensor) for key, tensor in tensors.items()}
                for tensors in (kept.trained, kept.plain)
            )
            self.kept[name] = Kept(kept.config, trained, plain)

    @property
    def single(self) -> str | None:
        """The name of the one active method; None if a sum is active."""
        return single_of(self.weights)


def single_of(weights: dict[str, float]) -> str | None:
    """The one name with weight 1; None for a sum."""
    return next(iter(weights)) if list(weights.values()) == [1] else None


@renamed_keyword("slots", "layout")
def inject_named(
    model: nn.Module,
    methods: dict[str, str | PeltConfig | os.PathLike],
    *,
    layout: Layout | None = None,
    pack: bool = True,
    together: bool = False,
    num_labels: Mapping[str, int] | None = None,
) -> nn.Module:
    """Put several methods into a model, each under a name. The first one is active.

    :func:`set_active` chooses another one, or a weighted sum. :func:`pelt_fast.save` writes the
    active method; :func:`pelt_fast.eject` takes out all of them. With ``together=True`` all of them
    stay in the model and train, and :func:`pelt_fast.route` chooses one for each row of a batch.

    Args:
        model: as for :func:`pelt_fast.inject`.
        methods: for each name a preset's name, a :class:`PeltConfig`, or the ``Path`` of a folder
            that :func:`pelt_fast.save` wrote.
        layout: as for :func:`pelt_fast.inject`.
        pack: as for :func:`pelt_fast.inject`.
        together: whether the methods are in the model at the same time. ``pack`` then has no
            effect: the frozen weights keep their own storage.
        num_labels: for methods that are together, the number of classes of those whose task head
            has another one than the model. That of a saved method is the saved head's. A forward
            with rows of unlike numbers returns a list as ``logits``, a tensor for each row, and
            takes no ``labels``.

    Returns:
        ``model``.

    Raises:
        ValueError: no method, full fine-tuning among them, ``num_labels`` that has no meaning, or
            what inject and load refuse. The model is unchanged.
        TypeError: ``num_labels`` is no mapping, or ``pack`` or ``together`` is not true or false.
        FileNotFoundError: a folder holds no saved method.

    Example:
        pelt_fast.inject_named(model, {"news": Path("news"), "mail": "lora"})
        pelt_fast.set_active(model, "mail")
    """
    if not methods:
        raise ValueError("methods must name at least one method, got none")
    flag("pack", pack)
    flag("together", together)
    configs = {name: preset(m) if isinstance(m, str) else m for name, m in methods.items()}
    for name, config in configs.items():
        if isinstance(config, PeltConfig) and config.is_full:
            raise ValueError(f"{name!r} is full fine-tuning, which leaves no base for the others")
    handle, model = model, unwrapped(model)
    refuse_second(model)
    _check_classes(num_labels, configs, together)
    named, classes = NamedMethods(layout, pack), dict(num_labels or {})
    for name, config in configs.items():
        if together and _has_own_classes(model, name, config, classes, named):
            continue
        if isinstance(config, os.PathLike):
            load(model, Path(config), **named.options)
        else:
            inject(model, config, **named.options)
        try:
            named.kept[name] = _capture(model)
        finally:
            eject(model)
    named.weights = {next(iter(configs)): 1.0}
    if together:
        put_together(model, named.kept, layout, classes)
        named.kept = {name: Kept(kept.config, {}, {}) for name, kept in named.kept.items()}
        _attach(model, named)
        return handle
    _apply(model, named, _target_of(named, named.weights, model))
    _attach(model, named)
    return handle


def _check_classes(classes: Mapping[str, int] | None, methods: dict, together: bool) -> None:
    if classes is None:
        return
    if not isinstance(classes, Mapping):
        kind = type(classes).__name__
        raise TypeError(f"num_labels must map names of methods to numbers of classes, got {kind}")
    if classes and not together:
        raise ValueError("num_labels needs together=True: one method at a time has the base's head")
    unknown = sorted(classes.keys() - methods.keys())
    if unknown:
        raise ValueError(f"num_labels names {unknown[0]!r}; the methods are {', '.join(methods)}")


def _has_own_classes(
    model: nn.Module, name: str, method, classes: dict[str, int], named: NamedMethods
) -> bool:
    """Whether a method has another number of classes than the model. If so, keep it in ``named``
    and its number in ``classes``."""
    config, tensors = method, None
    if isinstance(method, os.PathLike):
        config, tensors = read_method(model, method)
    count = classes_of(model, name, classes.pop(name, None), tensors)
    if count is None:
        return False
    check_num_labels(model, name, config, count)
    if tensors is None:
        inject(model, config, **named.options)
        try:
            tensors = _capture(model).trained | new_class_tensors(model, count)
        finally:
            eject(model)
    named.kept[name], classes[name] = Kept(config, tensors, {}), count
    return True


def active(model: nn.Module) -> dict[str, float]:
    """The active named methods.

    Args:
        model: a model that :func:`inject_named` was called on.

    Returns:
        Their weights, by name.

    Raises:
        ValueError: the model has no named methods.

    Example:
        pelt_fast.active(model)  # {"mail": 1.0}
    """
    return dict(_named_methods_of(model).weights)


def set_active(model: nn.Module, weights: str | dict[str, float]) -> nn.Module:
    """Make one named method active, or the sum h + Σ w Δh of several (paper, section 3).

    One method alone trains, and what it learned is kept when another one is chosen. A sum does not
    train. Task heads and biases become base + Σ w (trained - base). Between methods of equal
    configs, and between weights of one sum, the tensors are written in place. Otherwise new sites
    are made, and a new optimizer must be made as well.

    Args:
        model: a model that :func:`inject_named` was called on.
        weights: a name, or a weight for each of several names. That of a gated prefix or a prompt
            must be 1 or 0: its keys are there or not.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown name, a weight that is not finite, a merged model, or methods that no
            single method is the sum of (two adapters with a LayerNorm, one module modified in two
            ways). The model is unchanged.

    Example:
        pelt_fast.set_active(model, {"news": 0.7, "mail": 0.3})
    """
    named, handle, model = _named_methods_of(model), model, carrier_of(model)
    weights = {weights: 1.0} if isinstance(weights, str) else dict(weights)
    _check_weights(named, weights)
    if injection_of(model).merged:
        raise ValueError("this model is merged into its base: unmerge it before set_active")
    if are_together(model):
        activate_together(model, single_of(weights))
        named.weights = weights
        return handle
    if named.single is not None:
        named.kept[named.single] = _capture(model)
    before = _target_of(named, named.weights, model)
    after = _target_of(named, weights, model)
    try:
        _apply(model, named, after)
    except BaseException:
        _apply(model, named, before)
        raise
    else:
        named.weights = {name: float(weight) for name, weight in weights.items()}
    finally:
        _attach(model, named)
    return handle


def _check_weights(named: NamedMethods, weights: dict[str, float]) -> None:
    for name, weight in weights.items():
        if name not in named.kept:
            known = ", ".join(named.kept)
            raise ValueError(f"no method is named {name!r}; there are {known}")
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")
    if not weights:
        raise ValueError("weights must name at least one method, got none")


def _target_of(named: NamedMethods, weights: dict[str, float], model: nn.Module) -> _Target:
    """What the model becomes with these weights."""
    name = single_of(weights)
    if name is not None:
        return _Target(named.kept[name].config, named.kept[name].trained, True)
    chosen = {name: (named.kept[name], weight) for name, weight in weights.items()}
    base = {**parameters_of(model), **injection_of(model).before.trained}
    return _Target(sum_config(chosen), sum_tensors(chosen, base), False)


def _named_methods_of(model: nn.Module) -> NamedMethods:
    model = unwrapped(model)
    if _CHILD not in model._modules:
        none = f"this {type(model).__name__} has no named methods: use inject_named"
        raise ValueError(("_pelt" not in model.__dict__ and elsewhere(model)) or none)
    return model._modules[_CHILD]


def _attach(model: nn.Module, named: NamedMethods) -> None:
    """Make the named methods a child of the model, until it is ejected or merged for good."""
    if _CHILD not in model._modules:
        injection_of(model).changes.add(model, _CHILD, named)


def _method_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are the method: its sites', and the model's own that it trains."""
    trained = injection_of(model).own_trained
    return {n: p for n, p in parameters_of(model).items() if is_method(n) or n in trained}


@torch.no_grad()
def _capture(model: nn.Module) -> Kept:
    """A copy of the active method."""
    with at_hand(holders(model, _method_parameters(model))):
        # looked up again: accelerate replaces the parameters that it loads
        trained = {name: p.detach().clone() for name, p in _method_parameters(model).items()}
    plain = {name: tensor.clone() for name, tensor in method_tensors(model).items()}
    sites = set(method_modules(model))
    for name, module in modules_of(model).items():
        if module in sites and hasattr(module, "scale"):
            _fold_scale(name, module, plain)
    return Kept(injection_of(model).config, trained, plain)


def _fold_scale(name: str, module: nn.Module, plain: dict[str, Tensor]) -> None:
    """Multiply a site's second factor by its scale: a number, or learned, (1,) or (N,)."""
    scale = plain.pop(f"{name}.scale", module.scale)
    for last in UPDATE:
        tensor = plain.get(f"{name}.{last}")
        if tensor is not None:
            rows = isinstance(scale, Tensor) and tensor.dim() > 1
            tensor.mul_(scale[:, None] if rows else scale)


def _apply(model: nn.Module, named: NamedMethods, target: _Target) -> None:
    """Inject ``target``. It is written in place if the tensors are the same."""
    present = "_pelt" in model.__dict__
    if not present or not _fits(model, target):
        if present:
            eject(model)
        inject(model, target.config, **named.options)
        fold_banks(model, target.tensors)
        for parameter in _method_parameters(model).values():
            parameter.requires_grad_(target.trains)
    copy_tensors(model, target.tensors)


def _fits(model: nn.Module, target: _Target) -> bool:
    """Whether the injected method differs from ``target`` in values alone."""
    parameters = _method_parameters(model)
    present = dataclasses.replace(injection_of(model).config, name=target.config.name)
    shapes = {name: p.shape for name, p in parameters.items()}
    return (
        present == target.config
        and shapes == {name: tensor.shape for name, tensor in target.tensors.items()}
        and all(p.requires_grad == target.trains for p in parameters.values())
    )
