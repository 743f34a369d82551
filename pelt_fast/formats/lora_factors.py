"""LoRA of other libraries, by the names of its layers: the modifications and the factors.

Their files name linear layers; a method here names targets ("attention.q") and kinds of stacks. So
the layers are grouped by target, kind, rank and scale: each group is one modification.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import pad

from pelt_fast.config import KINDS, Modification
from pelt_fast.config.named_modules import MODULES
from pelt_fast.injection.described import stacks_found
from pelt_fast.injection.record import injection_of
from pelt_fast.injection.targets import linears_of_layers
from pelt_fast.layouts.lookup import base_of, stacks_of
from pelt_fast.modules.projection_view import ProjectionView, shape_of

_TARGETS = (
    "attention.q", "attention.k", "attention.v", "attention.o", "ffn.in", "ffn.out",
)  # fmt: skip


class Factors:
    """The factors of a LoRA on one linear layer: A (R, K), B (N, R), and its scale."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def on(self, linear: nn.Module) -> "Factors":
        """The factors of a projection that is a part of the layer's matrix."""
        rows = linear.which if isinstance(linear, ProjectionView) else None
        return self if rows is None else Factors(self.a, rows.of(self.b), self.scale)

    def brought_to(self, rank: int, scale: float) -> "Factors":
        """The same update, padded with zeros to ``rank``, at another scale."""
        missing = rank - self.a.shape[0]
        b = pad(self.b, (0, missing))
        b = b if scale == self.scale else b * (self.scale / scale)
        return Factors(pad(self.a, (0, 0, 0, missing)), b, scale)


Key = tuple[str, str]  # a linear layer's name, and which projection of its matrix ("": all of it)
FactorsByKey = dict[Key, Factors]
Linears = dict[int, list[nn.Module]]  # linear layers, by the index of the layer they are in


def lora_modifications(
    model: nn.Module, layers: dict[str, Factors], dropout: float, source: Path, parts: bool = False
) -> tuple[list[Modification], FactorsByKey]:
    """The modifications for LoRA on these layers, and the factors of each projection.

    ``parts``: LoRA on a whole joined projection becomes one on each of its projections, which then
    have an A of their own. Raises ValueError for a layer that no target has, and where only one of
    two layers that share a target has LoRA.
    """
    names = {module: name for name, module in model.named_modules()}
    # for each target, rank and scale: the layers of each kind of stack, None where it is all
    indices: dict[tuple[str, int, float], dict[str, tuple[int, ...] | None]] = {}
    placed: FactorsByKey = {}
    for (target, kind), linears in _linears_of_targets(model).items():
        groups: dict[tuple[int, float], list[int]] = {}
        for index, of_layer in linears.items():
            keys = {key_of(linear, names): linear for linear in of_layer}
            absent = [name for name, part in keys if name not in layers or (part and not parts)]
            if len(absent) == len(keys):
                continue
            if absent:
                present = next(name for name, _ in keys if name in layers)
                raise ValueError(
                    f"{source}: LoRA on {present} but not on {absent[0]}: {target} here is both"
                )
            group, factors = _alike(keys, layers, source)
            placed |= factors
            groups.setdefault(group, []).append(index)
        for group, on in groups.items():
            every = len(on) == len(linears)
            indices.setdefault((target, *group), {})[kind] = None if every else tuple(on)
    unknown = sorted(layers.keys() - {name for name, _ in placed})
    if unknown:
        raise ValueError(f"{source}: {type(model).__name__} has no place for LoRA on {unknown[0]}")
    return [
        Modification("low_rank", target, composition="scaled", size=rank, scale=scale,
                     dropout=dropout, layers=on, where=tuple(k for k in kinds if kinds[k] == on))
        for (target, rank, scale), kinds in indices.items()
        for on in dict.fromkeys(kinds.values())
    ], placed  # fmt: skip


def named_modifications(
    layers: dict[str, Factors], dropout: float
) -> tuple[list[Modification], FactorsByKey]:
    """As :func:`lora_modifications` for a model without a layout: LoRA on layers by name."""
    groups: dict[tuple[int, float], list[str]] = {}
    for name, factors in layers.items():
        groups.setdefault((factors.a.shape[0], factors.scale), []).append(name)
    return [
        Modification("low_rank", MODULES, composition="scaled", size=rank, scale=scale,
                     dropout=dropout, modules=tuple(names))
        for (rank, scale), names in groups.items()
    ], {(name, ""): factors for name, factors in layers.items()}  # fmt: skip


def has_layout(model: nn.Module) -> bool:
    """Whether it is known where the model keeps its attentions and FFNs."""
    try:
        return bool(stacks_of(model))
    except (TypeError, ValueError):
        return False


def _alike(
    keys: dict[Key, nn.Module], layers: dict[str, Factors], source: Path
) -> tuple[tuple[int, float], FactorsByKey]:
    """The linear layers of one target in one layer (gate and up) at one rank and scale."""
    for (name, _), linear in keys.items():
        _check_factors(layers[name], linear, name, source)
    factors = {key: layers[key[0]].on(linear) for key, linear in keys.items()}
    scales = {f.scale for f in factors.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(f.a.shape[0] for f in factors.values())
    return (rank, scale), {key: f.brought_to(rank, scale) for key, f in factors.items()}


def _linears_of_targets(model: nn.Module) -> dict[tuple[str, str], Linears]:
    """The linear layers of each target and kind of stack."""
    base, stacks = base_of(model), stacks_found(model)
    without_ffn = {stack.kind for stack in stacks if stack.ffn is None}
    by_target: dict[tuple[str, str], Linears] = {}
    for name in _TARGETS:
        for kind in KINDS:
            if name.startswith("ffn") and kind in without_ffn:
                continue
            probe = Modification("low_rank", name, size=1, where=(kind,))
            for target, _, linear in linears_of_layers(base, probe, stacks):
                linears = by_target.setdefault((name, kind), {})
                linears.setdefault(target.index, []).append(linear)
    return by_target


def key_of(linear: nn.Module, names: dict[nn.Module, str]) -> Key:
    """The key of a linear layer's factors."""
    if isinstance(linear, ProjectionView):
        return names[linear.owner], linear.name
    return names[linear], ""


def _check_factors(factors: Factors, linear: nn.Module, name: str, source: Path) -> None:
    whole = ProjectionView(linear.owner, "", None) if isinstance(linear, ProjectionView) else linear
    (outputs, inputs), a, b = shape_of(whole), tuple(factors.a.shape), tuple(factors.b.shape)
    if len(a) != 2 or a[1] != inputs or b != (outputs, a[0]):
        raise ValueError(
            f"{source}: factors {a} and {b} do not fit {name}, a layer of {inputs} to {outputs}"
        )


def lora_tensors(model: nn.Module, placed: FactorsByKey) -> dict[str, Tensor]:
    """The factors under our names, in an injected model."""
    names = {module: name for name, module in model.named_modules()}
    tensors = {}
    for site in injection_of(model).sites:
        if site.op == "lora":
            factors = placed[key_of(site.module.frozen.module, names)]
            tensors[f"{names[site.module]}.lora_a"] = factors.a
            tensors[f"{names[site.module]}.lora_b"] = factors.b
    return tensors
