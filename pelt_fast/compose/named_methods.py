"""Several named methods in one model: one of them at work, or a weighted sum of them.

Every method is a low-rank residual (paper section 3), so a sum of methods is one method whose
ranks are added: its factors stand side by side, the weights are in the second. A sum costs one
fused site of the whole rank, and a change of weights, or of one method for another of its config,
writes into the tensors that are there: nothing is compiled again.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.formats.checkpoint import copy_tensors, fold_banks, load, method_tensors
from pelt_fast.injection.values_before import Follower
from pelt_fast.injection.count import method_modules
from pelt_fast.injection.handles import carrier_of, elsewhere, refuse_second
from pelt_fast.injection.inject import eject, inject
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import is_method, modules_of, parameters_of, unwrapped
from pelt_fast.modules.hooked import at_hand, holders
from pelt_fast.presets import method as preset

# a tensor's axis of the rank; of a bottleneck for each head, (H, R, D), it is the second
_RANK_AXIS = {"lora_a": 0, "lora_b": 1, "down_weight": 0, "down_bias": 0, "up_weight": 1,
              "prefix": 3, "embedding": 0}  # fmt: skip
_UPDATE = ("lora_b", "up_weight", "up_bias")  # what a weight multiplies
_WAITING = "pelt_named_methods"  # the child that holds the methods that wait
_VISIBLE = ("prefix", "prompt")  # forms whose tokens are there or not


@dataclasses.dataclass
class Kept:
    """A method that waits: ``trained`` as it trains, ``plain`` folded and at scale one."""

    config: PeltConfig
    trained: dict[str, Tensor]
    plain: dict[str, Tensor]


class NamedMethods(Follower):
    """The named methods of one model, and which of them work; copies and pickles with it. Hangs on
    the model (``_WAITING``) so that those that wait are moved and cast with it."""

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
        """The name of the one method at work, None under a sum."""
        return single_of(self.weights)


def single_of(weights: dict[str, float]) -> str | None:
    """The one name there is, at weight 1; None of a sum."""
    return next(iter(weights)) if list(weights.values()) == [1] else None


@renamed_keyword("slots", "layout")
def inject_named(
    model: nn.Module,
    methods: dict[str, str | PeltConfig | os.PathLike],
    *,
    layout: Layout | None = None,
    pack: bool = True,
) -> nn.Module:
    """Put several methods into ``model`` by name, the first of them at work; returns the model.

    A value is a preset's name, a :class:`PeltConfig`, or a ``Path`` to a folder that
    :func:`pelt_fast.save` wrote. ``layout`` and ``pack`` as for :func:`pelt_fast.inject`. Raises
    what inject and load raise, and ValueError for no method or full fine-tuning; the model is then
    as it was. :func:`set_active` chooses; ``save`` writes what is at work, ``eject`` takes all out.
    """
    if not methods:
        raise ValueError("methods must name at least one method, got none")
    configs = {name: preset(m) if isinstance(m, str) else m for name, m in methods.items()}
    for name, config in configs.items():
        if isinstance(config, PeltConfig) and config.is_full:
            raise ValueError(f"{name!r} is full fine-tuning, which leaves no base for the others")
    handle, model = model, unwrapped(model)
    refuse_second(model)
    named = NamedMethods(layout, pack)
    for name, config in configs.items():
        if isinstance(config, os.PathLike):
            load(model, Path(config), **named.options)
        else:
            inject(model, config, **named.options)
        try:
            named.kept[name] = _capture(model)
        finally:
            eject(model)
    first = next(iter(configs))
    named.weights = {first: 1.0}
    _put(model, named, *_what(named, named.weights, model))
    _hang(model, named)
    return handle


def active(model: nn.Module) -> dict[str, float]:
    """The names at work and their weights; ValueError without :func:`inject_named`."""
    return dict(_named_methods_of(model).weights)


def set_active(model: nn.Module, weights: str | dict[str, float]) -> nn.Module:
    """Let one method work, or the sum h + Σ w Δh of several; returns the model.

    A method alone trains; what it learned is kept when another takes its place. A sum does not
    train. Between methods of one config, and between weights of one sum, tensors are written in
    place; otherwise sites are made anew, and an optimizer must be too. The sum of task heads and
    biases is base + Σ w (trained - base). Keys of a prefix or prompt stand side by side: their
    weight can be 1 or 0. Raises ValueError, the model unchanged, for an unknown name, a weight that
    is not finite, a merged model, methods that no sum can hold (two adapters with a LayerNorm, a
    place modified in two ways).
    """
    named, handle, model = _named_methods_of(model), model, carrier_of(model)
    injection = injection_of(model)
    weights = {weights: 1.0} if isinstance(weights, str) else dict(weights)
    for name, weight in weights.items():
        if name not in named.kept:
            known = ", ".join(named.kept)
            raise ValueError(f"no method is named {name!r}; there are {known}")
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")
    if not weights:
        raise ValueError("weights must name at least one method, got none")
    if injection.merged:
        raise ValueError("this model is merged into its base: unmerge it before set_active")
    if named.single is not None:
        named.kept[named.single] = _capture(model)
    before = _what(named, named.weights, model)
    after = _what(named, weights, model)
    try:
        _put(model, named, *after)
    except BaseException:
        _put(model, named, *before)
        raise
    else:
        named.weights = {name: float(weight) for name, weight in weights.items()}
    finally:
        _hang(model, named)
    return handle


def _what(named: NamedMethods, weights: dict[str, float], model: nn.Module) -> tuple:
    """The config and tensors of a method or a sum, and whether it trains."""
    name = single_of(weights)
    if name is not None:
        return named.kept[name].config, named.kept[name].trained, True
    chosen = {name: (named.kept[name], weight) for name, weight in weights.items()}
    return _sum_config(chosen), _sum_tensors(chosen, model), False


def _named_methods_of(model: nn.Module) -> NamedMethods:
    model = unwrapped(model)
    if _WAITING not in model._modules:
        none = f"this {type(model).__name__} has no named methods: use inject_named"
        raise ValueError(("_pelt" not in model.__dict__ and elsewhere(model)) or none)
    return model._modules[_WAITING]


def _hang(model: nn.Module, named: NamedMethods) -> None:
    """Let the methods that wait be the model's until it ejects, or merges for good."""
    if _WAITING not in model._modules:
        injection_of(model).changes.add(model, _WAITING, named)


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are the method: its sites', and the model's own that it trains."""
    own = injection_of(model).own_trained
    return {n: p for n, p in parameters_of(model).items() if is_method(n) or n in own}


@torch.no_grad()
def _capture(model: nn.Module) -> Kept:
    with at_hand(holders(model, _own(model))):
        trained = {name: p.detach().clone() for name, p in _own(model).items()}
    plain = {name: tensor.clone() for name, tensor in method_tensors(model).items()}
    ours = set(method_modules(model))
    for name, module in modules_of(model).items():
        if module not in ours or not hasattr(module, "scale"):
            continue
        scale = plain.pop(f"{name}.scale", module.scale)
        for last in _UPDATE:
            tensor = plain.get(f"{name}.{last}")
            if tensor is not None:
                rows = isinstance(scale, Tensor) and tensor.dim() > 1
                tensor.mul_(scale[:, None] if rows else scale)
    return Kept(injection_of(model).config, trained, plain)


def _put(model, named: NamedMethods, config: PeltConfig, tensors: dict, trains: bool) -> None:
    """Let ``config`` with ``tensors`` be what is injected: in place where it is already."""
    there = model.__dict__.get("_pelt")
    if there is None or not _same(model, config, tensors, trains):
        if there is not None:
            eject(model)
        inject(model, config, **named.options)
        fold_banks(model, tensors)
        for parameter in _own(model).values():
            parameter.requires_grad_(trains)
    copy_tensors(model, tensors)


def _same(model: nn.Module, config: PeltConfig, tensors: dict, trains: bool) -> bool:
    own = _own(model)
    present = dataclasses.replace(injection_of(model).config, name=config.name)
    shapes = {name: p.shape for name, p in own.items()} == {n: t.shape for n, t in tensors.items()}
    return present == config and shapes and all(p.requires_grad == trains for p in own.values())


def _place(m: Modification) -> Modification:
    """A modification as the sum has it, of size 1 (of a bias: 0)."""
    composition = m.composition if m.form in _VISIBLE else "add"
    return dataclasses.replace(
        m, composition=composition, size=min(m.size, 1), scale=1.0, dropout=0.0, init="lora",
        reparameterization="none", mlp_dim=1,
    )  # fmt: skip


def _sum_config(chosen: dict[str, tuple[Kept, float]]) -> PeltConfig:
    """The method that the weighted sum is."""
    sizes: dict[Modification, int] = {}
    for name, (kept, weight) in chosen.items():
        for m in kept.config.modifications:
            if m.form in _VISIBLE and weight not in (0, 1) and m.composition == "gated":
                raise ValueError(
                    f"{name!r} has a {m.form}, whose keys are there or not: its weight can be 1 or"
                    f" 0, got {weight}"
                )
            place = _place(m)
            ungated = (m.form, m.composition) == ("prefix", "add")
            if place in sizes and (m.layer_norm != "none" or ungated):
                what = "an ungated prefix" if ungated else "an adapter with a LayerNorm"
                raise ValueError(
                    f"two methods have {what} on {m.target}: no one of them is their sum"
                )
            if m.layer_norm == "out" and weight != 1:
                raise ValueError(f"{name!r} has a LayerNorm on its update: its weight must be 1")
            if m.form not in _VISIBLE or weight:
                sizes[place] = sizes.get(place, 0) + m.size
    configs = [kept.config for kept, _ in chosen.values()]
    return PeltConfig(
        " + ".join(f"{weight:g} {name}" for name, (_, weight) in chosen.items()),
        tuple(dataclasses.replace(place, size=size) for place, size in sizes.items()),
        any(config.train_head for config in configs),
        max((c.dtype for c in configs), key=lambda dtype: getattr(torch, dtype).itemsize),
    )


@torch.no_grad()
def _sum_tensors(chosen: dict, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the method that the weighted sum is, by name."""
    base = {**parameters_of(model), **injection_of(model).before.trained}
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for kept, weight in chosen.values():
        for name, tensor in kept.plain.items():
            found.setdefault(name, []).append((tensor, weight))
    tensors = {}
    for name, parts in found.items():
        if not is_method(name):
            before = base[name]
            tensors[name] = before + sum(w * (t - before) for t, w in parts)
        else:
            tensors[name] = _joined(name.rpartition(".")[2], parts)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _joined(last: str, parts: list[tuple[Tensor, float]]) -> Tensor | None:
    """One tensor of the sum from those of its methods."""
    if last in ("prefix", "embedding"):
        parts = [(tensor, weight) for tensor, weight in parts if weight]
        if not parts:
            return None
    tensors = [weight * t if last in _UPDATE else t for t, weight in parts]
    if last == "prefix" and parts[0][1] != 1:  # an ungated one: its values carry the weight
        tensors = [torch.stack([tensors[0][:, 0], parts[0][1] * tensors[0][:, 1]], 1)]
    if last == "up_bias":
        return sum(tensors[1:], tensors[0])
    if last not in _RANK_AXIS:
        return tensors[0]  # a LayerNorm's, of one method alone
    return torch.cat(tensors, 1 if tensors[0].dim() == 3 else _RANK_AXIS[last])
