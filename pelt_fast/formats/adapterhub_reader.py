"""AdapterHub's files, read without ``adapters``: ``adapter_config.json`` and
``adapter.safetensors`` or ``pytorch_adapter.bin``, as adapters 1.x lays them out.

Keys: a bottleneck is ``{layer}.{place}.adapters.{name}.adapter_down.0`` (``.1`` behind a LayerNorm)
and ``.adapter_up``, the place ``output`` and ``attention.output`` in BERT's family, elsewhere
``output_adapters``, ``attention_adapters``, ``cross_attention_adapters``; LoRA is
``{projection}.loras.{name}.lora_A``; a prefix ``{base}.prefix_tuning.prefix_tunings.{name}.
{self,encoder,cross}_prefix``, repeated below every attention that shares it.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.injection.record import Site, injection_of
from pelt_fast.layouts.lookup import base_of, stacks_of, task_head
from pelt_fast.modules import PrefixBank

from .adapterhub_config import (
    bottleneck_modifications,
    check_config,
    lora_scale,
    parts_of,
    prefix_modifications,
)
from .foreign import Factors, Placed, adopt, lora_tensors, place_lora, read_json, read_weights

CONFIG_FILE, HEAD_CONFIG_FILE = "adapter_config.json", "head_config.json"
WEIGHTS_FILES = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_FILES = "model_head.safetensors", "pytorch_model_head.bin"
_BERT_LIKE = ("bert", "roberta", "electra", "xlm-roberta")
_T5_LIKE = ("t5", "mt5")
_PREFIXES = {"encoder": "encoder_prefix", "decoder": "self_prefix", "cross": "cross_prefix"}


def load_adapterhub(model: nn.Module, folder: str | os.PathLike, *, head: bool = True) -> nn.Module:
    """Inject the method that AdapterHub's ``save_adapter`` wrote to ``folder``, with its weights
    and the task head beside it (``head=False`` leaves that out); returns the model.

    Parallel and Houlsby bottlenecks (``par_bn``, ``double_seq_bn``, learned scales), LoRA, prefix
    tuning and unions of them (``mam``), layers left out, on the architectures where they were
    compared with AdapterHub's own. Raises FileNotFoundError, or ValueError with the reason:
    Pfeiffer's ``seq_bn``, whose residual leaves out what its LayerNorm adds, gates, Compacter, IA3,
    a prefix of T5, dropout of an adapter's output, a key or tensor that is not known, a head that
    is not the model's; the model is then as it was.
    """
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

    def fill() -> dict[str, Tensor]:
        found, used = {**lora_tensors(model, placed), **saved_head}, set()
        names = {module: name for name, module in model.named_modules()}
        for site in injection_of(model).sites:
            if isinstance(site.module, PrefixBank):
                keys, values = _prefix(model, site, name, tensors, names[site.module])
            elif site.form == "bottleneck":
                keys, values = _bottleneck(model, site, name, tensors, names[site.module])
            else:
                continue
            used |= keys
            found |= values
        _check_used(tensors, used, name, folder)
        return found

    return adopt(model, method, fill, folder)


def _read(model, parts: list[dict], name: str, tensors, folder) -> tuple[list, Placed]:
    """The modifications of every part, and the LoRA's factors where they go."""
    modifications: list[Modification] = []
    placed: Placed = {}
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
            found, placed = place_lora(model, loras, float(part.get("dropout", 0)), folder)
            modifications += found
    return modifications, placed


def _check_used(tensors: dict[str, Tensor], used: set[str], name: str, folder) -> None:
    """ValueError for a tensor nobody took. A prefix is written once more below every attention that
    shares it: what ends like one that was taken, and is it, is no other."""
    for key, tensor in tensors.items():
        if key in used or re.search(rf"\.loras\.{re.escape(name)}\.lora_[AB]$", key):
            continue
        end = key[key.find("prefix_tunings.") :]
        if not any(k.endswith(end) and torch.equal(tensors[k], tensor) for k in used):
            raise ValueError(f"{folder}: there is no place for {key}")


def _check_sizes(modifications: list[Modification], tensors: dict[str, Tensor], folder) -> None:
    """A size is a dim of some tensor, or divides a flat one: no other is allocated."""
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
    found = {key: re.fullmatch(pattern, key) for key in tensors}
    return {
        match[1]: Factors(tensors[key], tensors[key[:-1] + "B"], scale)
        for key, match in found.items() if match
    }  # fmt: skip


def _place_of(model: nn.Module, site: Site, name: str) -> str:
    """The key of a bottleneck in front of ``.adapter_down``."""
    base = base_of(model)
    for stack in stacks_of(model):
        found = re.match(rf"{re.escape(stack.layers)}\.\d+", site.name)
        if found is None:
            continue
        layer, path = found[0], site.name[found.end() + 1 :]
        outs = {attention.out: attention.kind for attention in stack.attentions}
        if base.config.model_type in _T5_LIKE:
            place = ".".join(path.split(".")[:2])
        elif base.config.model_type in _BERT_LIKE:
            place = "attention.output" if path in outs else "output"
        elif path in outs:
            place = "cross_attention_adapters" if outs[path] == "cross" else "attention_adapters"
        else:
            place = "output_adapters"
        head = f"{model.base_model_prefix}." if base is not model else ""
        return f"{head}{layer}.{place}.adapters.{name}"
    raise ValueError(f"{site.name} is in no stack of {type(model).__name__}")


def bottleneck_keys(model: nn.Module, site: Site, name: str) -> dict[str, str]:
    """Our names of a bottleneck's tensors, each with AdapterHub's key."""
    place, module = _place_of(model, site, name), site.module
    down = 1 if module.layer_norm == "in" else 0
    keys = {"down_weight": f"adapter_down.{down}.weight", "down_bias": f"adapter_down.{down}.bias",
            "up_weight": "adapter_up.weight", "up_bias": "adapter_up.bias"}  # fmt: skip
    if module.layer_norm != "none":
        norm = "adapter_norm_before" if module.layer_norm == "in" else "adapter_norm_after"
        keys |= {"norm.weight": f"{norm}.weight", "norm.bias": f"{norm}.bias"}
    if isinstance(module.scale, Tensor):
        keys["scale"] = "scaling"
    return {ours: f"{place}.{theirs}" for ours, theirs in keys.items()}


def _bottleneck(model, site: Site, name: str, tensors: dict, prefix: str) -> tuple[set, dict]:
    """The keys a site takes, and their tensors by our names."""
    keys = {o: key for o, key in bottleneck_keys(model, site, name).items() if key in tensors}
    return set(keys.values()), {f"{prefix}.{ours}": tensors[key] for ours, key in keys.items()}


def prefix_key(model: nn.Module, site: Site, name: str) -> str:
    """The key of a prefix in front of its tensors."""
    single = len(stacks_of(model)) == 1
    head = f"{model.base_model_prefix}." if base_of(model) is not model else ""
    part = "self_prefix" if single else _PREFIXES[_kind(model, site)]
    return f"{head}prefix_tuning.prefix_tunings.{name}.{part}"


def _kind(model: nn.Module, site: Site) -> str:
    for stack in stacks_of(model):
        for attention in stack.attentions:
            layer, module = map(re.escape, (stack.layers, attention.module))
            if re.fullmatch(rf"{layer}\.\d+\.{module}", site.name):
                return attention.kind
    raise ValueError(f"{site.name} is no attention of {type(model).__name__}")


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
    """The task head saved beside an adapter. An output layer is saved with it that did not train:
    what the model holds already is left there. ValueError for whatever else is not the model's
    head."""
    if not any((folder / name).is_file() for name in HEAD_FILES):
        return {}
    own = {
        f"{name}.{path}": parameter.shape
        for name, child in task_head(model).items() for path, parameter in child.named_parameters()
    }  # fmt: skip
    found = read_weights(folder, *HEAD_FILES)
    head = {name: tensor for name, tensor in found.items() if own.get(name) == tensor.shape}
    there = model.state_dict()
    for name in found.keys() - head.keys():
        mine = there.get(name)
        same = mine is not None and torch.equal(mine.cpu(), found[name].to(mine.dtype))
        if not same:
            raise ValueError(
                f"{folder}: {name} of the head is not of the head of {type(model).__name__}, nor"
                " what the model holds already; head=False reads the adapter without it"
            )
    return head
