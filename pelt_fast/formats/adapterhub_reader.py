"""AdapterHub's files, read without ``adapters``: the config, the tensors, and a task head."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.injection.record import Site, injection_of
from pelt_fast.layouts.lookup import task_head
from pelt_fast.layouts.names import check_model
from pelt_fast.modules import PrefixBank

from .adapterhub_config import (
    bottleneck_modifications,
    check_config,
    lora_scale,
    parts_of,
    prefix_modifications,
)
from .adapterhub_keys import CONFIG_FILE, HEAD_FILES, WEIGHTS_FILES, bottleneck_keys, prefix_key
from .foreign import inject_with_tensors, read_json, read_weights
from .lora_factors import Factors, FactorsByKey, lora_modifications, lora_tensors


def load_adapterhub(model: nn.Module, folder: str | os.PathLike, *, head: bool = True) -> nn.Module:
    """Inject a method that AdapterHub saved, with its weights and its task head.

    Parallel and Houlsby bottlenecks (``par_bn``, ``double_seq_bn``, learned scales), LoRA, prefix
    tuning and unions of them (``mam``), also with layers left out. Each is read for the
    architectures on which it was compared with AdapterHub's own.

    Args:
        model: a model of the base that the files belong to, without a method.
        folder: what ``save_adapter`` of adapters 1.x wrote. ``adapters`` is not needed.
        head: False leaves the task head beside the adapter out.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the method has no counterpart here (Pfeiffer's ``seq_bn``,
            whose residual leaves out what its LayerNorm adds; gates, Compacter, IA3, a prefix of
            T5, dropout of an adapter's output); a key or tensor is not known; or the head is not
            the model's. The message says which, and the model is unchanged.

    Example:
        model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        pelt_fast.load_adapterhub(model, "my-adapter")
    """
    check_model(model)
    folder = Path(folder)
    about = read_json(folder / CONFIG_FILE)
    if not isinstance(about.get("config"), dict) or not isinstance(about.get("name"), str):
        raise ValueError(f"{folder / CONFIG_FILE} is no AdapterHub config: config or name missing")
    name, tensors = about["name"], read_weights(folder, *WEIGHTS_FILES)
    saved_head = _read_head(model, folder) if head else {}
    try:
        modifications, placed = _read(model, parts_of(about, folder), name, tensors, folder)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is none of adapters 1.x: {error!r}") from None
    _check_sizes(modifications, tensors, folder)
    method = PeltConfig(name, tuple(modifications), bool(saved_head))

    def tensors_of() -> dict[str, Tensor]:
        ours, used = {**lora_tensors(model, placed), **saved_head}, set()
        names = {module: name for name, module in model.named_modules()}
        for site in injection_of(model).sites:
            if isinstance(site.module, PrefixBank):
                keys, values = _prefix(model, site, name, tensors, names[site.module])
            elif site.form == "bottleneck":
                keys, values = _bottleneck(model, site, name, tensors, names[site.module])
            else:
                continue
            used |= keys
            ours |= values
        _check_used(tensors, used, name, folder)
        return ours

    return inject_with_tensors(model, method, tensors_of, folder)


def _read(model, parts: list[dict], name: str, tensors, folder) -> tuple[list, FactorsByKey]:
    """The modifications of every part, and the LoRA's factors."""
    modifications: list[Modification] = []
    placed: FactorsByKey = {}
    for part in parts:
        kind = check_config(model, part, folder)
        if kind == "prefix_tuning":
            modifications += prefix_modifications(model, part, folder)
        elif kind == "bottleneck":
            modifications += bottleneck_modifications(model, part, folder)
        else:
            loras = _loras(name, tensors, lora_scale(part, folder))
            ranks = {factors.a.shape[0] for factors in loras.values()}
            if ranks != {part["r"]}:
                raise ValueError(f"{folder}: r={part['r']}, the factors are of rank {ranks or 0}")
            dropout = float(part.get("dropout", 0))
            of_part, placed = lora_modifications(model, loras, dropout, folder)
            modifications += of_part
    return modifications, placed


def _check_used(tensors: dict[str, Tensor], used: set[str], name: str, folder) -> None:
    """ValueError for a tensor that was not used. A prefix is written again under every attention
    that shares it: a tensor with the same end of its name, and equal, is a copy."""
    for key, tensor in tensors.items():
        if key in used or re.search(rf"\.loras\.{re.escape(name)}\.lora_[AB]$", key):
            continue
        end = key[key.find("prefix_tunings.") :]
        if not any(k.endswith(end) and torch.equal(tensors[k], tensor) for k in used):
            raise ValueError(f"{folder}: there is no place for {key}")


def _check_sizes(modifications: list[Modification], tensors: dict[str, Tensor], folder) -> None:
    """A size must be a dimension of a tensor, or divide a flat tensor. No other is allocated."""
    dims = {size for tensor in tensors.values() for size in tensor.shape}
    flat = [tensor.numel() for tensor in tensors.values() if tensor.dim() == 1]
    for m in modifications:
        divides = m.form == "prefix" and any(n % m.size == 0 for n in flat)
        if m.size not in dims and not divides:
            raise ValueError(
                f"{folder}: {CONFIG_FILE} asks for a {m.form} of size {m.size}, the weights hold"
                " none"
            )


def _loras(name: str, tensors: dict[str, Tensor], scale: float) -> dict[str, Factors]:
    pattern = rf"(.+)\.loras\.{re.escape(name)}\.lora_A"
    matches = {key: re.fullmatch(pattern, key) for key in tensors}
    return {
        match[1]: Factors(tensors[key], tensors[key[:-1] + "B"], scale)
        for key, match in matches.items() if match
    }  # fmt: skip


def _bottleneck(model, site: Site, name: str, tensors: dict, prefix: str) -> tuple[set, dict]:
    """The keys that a bottleneck uses, and their tensors under our names."""
    keys = {o: key for o, key in bottleneck_keys(model, site, name).items() if key in tensors}
    return set(keys.values()), {f"{prefix}.{ours}": tensors[key] for ours, key in keys.items()}


_MLP = {"embedding": "wte.weight", "mlp.0.weight": "control_trans.0.weight",
        "mlp.0.bias": "control_trans.0.bias", "mlp.2.weight": "control_trans.2.weight",
        "mlp.2.bias": "control_trans.2.bias"}  # fmt: skip


def _prefix(model, site: Site, name: str, tensors: dict, ours: str) -> tuple[set, dict]:
    key, bank = prefix_key(model, site, name), site.module
    if bank.prefix is None:
        keys = {mine: f"{key}.{theirs}" for mine, theirs in _MLP.items()}
        keys = {mine: theirs for mine, theirs in keys.items() if theirs in tensors}
        return set(keys.values()), {f"{ours}.{mine}": tensors[k] for mine, k in keys.items()}
    flat = tensors.get(f"{key}.control_trans")
    if flat is None or flat.numel() != bank.prefix.numel():
        return set(), {}
    layers, two, heads, size, dim = bank.shape
    both = flat.view(size, layers, two, heads, dim).permute(1, 2, 3, 0, 4)
    return {f"{key}.control_trans"}, {f"{ours}.prefix": both}


def _read_head(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The task head saved beside an adapter. AdapterHub also saves an output layer that did not
    train: what equals the model's own is left out. Raises ValueError for any other tensor that is
    not of the model's head."""
    if not any((folder / name).is_file() for name in HEAD_FILES):
        return {}
    shapes = {
        f"{name}.{path}": parameter.shape
        for name, child in task_head(model).items() for path, parameter in child.named_parameters()
    }  # fmt: skip
    saved = read_weights(folder, *HEAD_FILES)
    head = {name: tensor for name, tensor in saved.items() if shapes.get(name) == tensor.shape}
    present = model.state_dict()
    for name in saved.keys() - head.keys():
        mine = present.get(name)
        same = mine is not None and torch.equal(mine.cpu(), saved[name].to(mine.dtype))
        if not same:
            raise ValueError(
                f"{folder}: {name} of the head is not of the head of {type(model).__name__}, nor"
                " what the model holds already; head=False reads the adapter without it"
            )
    return head
