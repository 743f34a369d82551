"""What the readers of other libraries' checkpoints share: files, LoRA by its layers' names, and the
tensors' way into a freshly injected model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import KINDS, Modification, PeltConfig
from pelt_fast.injection.inject import eject, inject
from pelt_fast.injection.record import injection_of
from pelt_fast.injection.targets import placed_linears
from pelt_fast.layouts.lookup import base_of, stacks_of
from pelt_fast.layouts.names import is_method
from pelt_fast.modules.projection_view import ProjectionView, shape_of

from .checkpoint import check_fits, copy_tensors, fold_banks, read_tensors

LORA_TARGETS = (
    "attention.q", "attention.k", "attention.v", "attention.o", "ffn.in", "ffn.out",
)  # fmt: skip


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError, or ValueError when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return found


def read_weights(folder: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of the first of the files that is there; nothing in them is executed."""
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            return read_tensors(path)
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle raises
            raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from None
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError(f"{path} holds no tensors by name")
        return found
    raise FileNotFoundError(f"no adapter in {folder}: {' or '.join(names)} is missing")


def adopt(
    model: nn.Module, config: PeltConfig, fill: Callable[[], dict[str, Tensor]], source: Path
) -> nn.Module:
    """Inject ``config`` and give it the tensors that ``fill`` names as ours; a task head that is
    not among them stays the model's own. Raises ValueError where one is missing or does not fit;
    the model is then as it was."""
    inject(model, config)
    try:
        tensors = fill()
        fold_banks(model, tensors)
        own = injection_of(model).own_trained & tensors.keys()
        expected = {n: p for n, p in model.named_parameters() if is_method(n) or n in own}
        check_fits(expected, tensors, source)
        copy_tensors(model, tensors)
    except BaseException:
        eject(model)
        raise
    return model


class Factors:
    """The factors of a LoRA on one linear layer: A (R, K), B (N, R), its scale."""

    def __init__(self, a: Tensor, b: Tensor, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def on(self, linear: nn.Module) -> "Factors":
        """Those of a part of the layer."""
        rows = linear.rows if isinstance(linear, ProjectionView) else None
        return self if rows is None else Factors(self.a, self.b[rows], self.scale)

    def brought_to(self, rank: int, scale: float) -> "Factors":
        """The same update, with zeros up to ``rank``, at another scale."""
        pad, missing = torch.nn.functional.pad, rank - self.a.shape[0]
        b = pad(self.b, (0, missing))
        b = b if scale == self.scale else b * (self.scale / scale)
        return Factors(pad(self.a, (0, 0, 0, missing)), b, scale)


Key = tuple[str, str]  # of a linear layer: its name, and which part of it ("": all)
Placed = dict[Key, Factors]


def place_lora(
    model: nn.Module, layers: dict[str, Factors], dropout: float, source: Path, parts: bool = False
) -> tuple[list[Modification], Placed]:
    """The modifications that LoRA on these layers is, and the factors where they go: on each target
    of a kind of layer, one for each rank and scale, with the layers that have it. ``parts``: one on
    a whole fused projection is one on each of its parts, which then have an A of their own. Raises
    ValueError for a layer that no target has, or for one of two that share a target."""
    names = {module: name for name, module in model.named_modules()}
    points: dict[tuple, dict[str, tuple | None]] = {}
    placed: Placed = {}
    for (target, kind), by_layer in _targets(model).items():
        found: dict[tuple, list[int]] = {}
        for index, linears in by_layer.items():
            keys = {key_of(linear, names): linear for linear in linears}
            absent = [name for name, part in keys if name not in layers or (part and not parts)]
            if len(absent) == len(keys):
                continue
            if absent:
                present = next(name for name, _ in keys if name in layers)
                raise ValueError(
                    f"{source}: LoRA on {present} but not on {absent[0]}: {target} here is both"
                )
            for (name, _), linear in keys.items():
                _check_factors(layers[name], linear, name, source)
            factors = {key: layers[key[0]].on(linear) for key, linear in keys.items()}
            scales = {f.scale for f in factors.values()}
            scale = scales.pop() if len(scales) == 1 else 1.0
            rank = max(f.a.shape[0] for f in factors.values())
            placed |= {key: f.brought_to(rank, scale) for key, f in factors.items()}
            found.setdefault((rank, scale), []).append(index)
        for point, indices in found.items():
            every = len(indices) == len(by_layer)
            points.setdefault((target, *point), {})[kind] = None if every else tuple(indices)
    strange = sorted(layers.keys() - {name for name, _ in placed})
    if strange:
        raise ValueError(f"{source}: {type(model).__name__} has no place for LoRA on {strange[0]}")
    return [
        Modification("low_rank", target, composition="scaled", size=rank, scale=scale,
                     dropout=dropout, layers=indices,
                     where=tuple(kind for kind in kinds if kinds[kind] == indices))
        for (target, rank, scale), kinds in points.items()
        for indices in dict.fromkeys(kinds.values())
    ], placed  # fmt: skip


def _targets(model: nn.Module) -> dict[tuple[str, str], dict[int, list[nn.Module]]]:
    """The linear layers of each target of each kind, by the index of their layer."""
    base, stacks = base_of(model), stacks_of(model)
    bare = {stack.kind for stack in stacks if stack.ffn is None}
    found: dict[tuple[str, str], dict[int, list[nn.Module]]] = {}
    for target in LORA_TARGETS:
        for kind in KINDS:
            if target.startswith("ffn") and kind in bare:
                continue
            probe = Modification("low_rank", target, size=1, where=(kind,))
            for place, _, linear in placed_linears(base, probe, stacks):
                by_layer = found.setdefault((target, kind), {})
                by_layer.setdefault(place.index, []).append(linear)
    return found


def key_of(linear: nn.Module, names: dict[nn.Module, str]) -> Key:
    """What a linear layer's factors are kept under."""
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


def lora_tensors(model: nn.Module, placed: Placed) -> dict[str, Tensor]:
    """The factors by our names."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for site in injection_of(model).sites:
        if site.op == "lora":
            factors = placed[key_of(site.module.frozen.module, names)]
            found[f"{names[site.module]}.lora_a"] = factors.a
            found[f"{names[site.module]}.lora_b"] = factors.b
    return found
