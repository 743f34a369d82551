"""What the readers of other libraries' checkpoints share: files, LoRA by its layers' names, and the
tensors' way into a freshly injected model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import KINDS, Modification, PeltConfig

from .checkpoint import check_fits, copy_tensors, fold_banks, read_tensors
from .count import is_method
from .inject import eject, inject
from .places import linears
from .slots import base_of, stacks_of
from .takeover import takeover_of

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
        own = takeover_of(model).own_trained & tensors.keys()
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


def lora_modifications(
    model: nn.Module, layers: dict[str, Factors], dropout: float, source: Path
) -> list[Modification]:
    """The modifications that LoRA on these layers is. A rank or scale of a single layer's own goes
    into the factors (zeros fill a rank up). Raises ValueError for a layer that no target has, or a
    target on some layers only: ``layers`` is then as it was."""
    base, stacks = base_of(model), stacks_of(model)
    names = {module: name for name, module in model.named_modules()}
    known, points = set(), {}
    bare = {stack.kind for stack in stacks if stack.ffn is None}
    for target in LORA_TARGETS:
        for kind in KINDS:
            if target.startswith("ffn") and kind in bare:
                continue
            probe = Modification("low_rank", target, size=1, where=(kind,))
            places = [names.get(linear) for _, linear in linears(base, probe, stacks)]
            present = [name for name in places if name in layers]
            absent = [name for name in places if name not in layers]
            if present and absent:
                raise ValueError(
                    f"{source}: LoRA on {present[0]} but not on {absent[0]}: a method here is on"
                    f" every layer that {target} names"
                )
            known |= set(present)
            if present:
                found = [layers[name] for name in present]
                scales = {factors.scale for factors in found}
                scale = scales.pop() if len(scales) == 1 else 1.0
                point = target, max(factors.a.shape[0] for factors in found), scale
                points.setdefault(point, ([], []))[0].append(kind)
                points[point][1].extend(found)
    strange = sorted(layers.keys() - known)
    if strange:
        raise ValueError(f"{source}: {type(model).__name__} has no place for LoRA on {strange[0]}")
    for (_, size, scale), (_, found) in points.items():
        for factors in found:
            missing = size - factors.a.shape[0]
            factors.a = torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
            factors.b = torch.nn.functional.pad(factors.b, (0, missing)) * (factors.scale / scale)
    return [
        Modification("low_rank", target, composition="scaled", size=size, scale=scale,
                     dropout=dropout, where=tuple(kinds))
        for (target, size, scale), (kinds, _) in points.items()
    ]  # fmt: skip


def lora_tensors(model: nn.Module, layers: dict[str, Factors]) -> dict[str, Tensor]:
    """The factors by our names."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for site in takeover_of(model).sites:
        if site.op == "lora":
            factors = layers[names[site.module.slot.module]]
            found[f"{names[site.module]}.lora_a"] = factors.a
            found[f"{names[site.module]}.lora_b"] = factors.b
    return found
