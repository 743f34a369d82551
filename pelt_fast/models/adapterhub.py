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

from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.modules import PrefixBank

from .adopt import Factors, adopt, lora_modifications, lora_tensors, read_json, read_weights
from .slots import base_of, stacks_of, task_head
from .takeover import Site, takeover_of

CONFIG_FILE, HEAD_CONFIG_FILE = "adapter_config.json", "head_config.json"
WEIGHTS_FILES = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_FILES = "model_head.safetensors", "pytorch_model_head.bin"
ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "tanh": "tanh",
                "gelu_new": "gelu_tanh"}  # fmt: skip
_BERT_LIKE = ("bert", "roberta", "electra", "xlm-roberta")
_PREFIXES = {"encoder": "encoder_prefix", "decoder": "self_prefix", "cross": "cross_prefix"}


def load_adapterhub(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Inject the method that AdapterHub's ``save_adapter`` wrote to ``folder``, with its weights
    and the task head beside it; returns the model.

    Parallel and Houlsby bottlenecks (``par_bn``, ``double_seq_bn``, learned scales), LoRA, prefix
    tuning and unions of them (``mam``). Raises FileNotFoundError, or ValueError with the reason:
    Pfeiffer's ``seq_bn``, whose residual leaves out what its LayerNorm adds, gates, Compacter,
    layers left out, dropout of an adapter's output; the model is then as it was.
    """
    folder = Path(folder)
    about = read_json(folder / CONFIG_FILE)
    if not isinstance(about.get("config"), dict) or not isinstance(about.get("name"), str):
        raise ValueError(f"{folder / CONFIG_FILE} is no AdapterHub config: config or name missing")
    name, config = about["name"], about["config"]
    tensors = read_weights(folder, *WEIGHTS_FILES)
    head = _read_head(model, folder)
    parts = config["configs"] if config.get("architecture") == "union" else [config]
    loras = _loras(name, tensors)
    try:
        modifications = [m for part in parts for m in _modifications(model, part, loras, folder)]
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is none of adapters 1.x: {error!r}") from None
    _check_sizes(modifications, tensors, folder)
    method = PeltConfig(name, tuple(modifications), bool(head))

    def fill() -> dict[str, Tensor]:
        found = {**lora_tensors(model, loras), **head}
        names = {module: name for name, module in model.named_modules()}
        for site in takeover_of(model).sites:
            if isinstance(site.module, PrefixBank):
                found |= _prefix(model, site, name, tensors, names[site.module])
            elif site.form == "bottleneck":
                found |= _bottleneck(model, site, name, tensors, names[site.module])
        return found

    return adopt(model, method, fill, folder)


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


def _modifications(model, config: dict, loras: dict[str, Factors], folder) -> list[Modification]:
    kind = config.get("architecture")
    for flag in ("use_gating", "phm_layer", "leave_out", "use_dora", "inv_adapter"):
        if config.get(flag):
            raise ValueError(f"{folder}: {flag}={config[flag]} of AdapterHub has no place here")
    if kind == "prefix_tuning":
        return [_prefix_modification(model, config, folder)]
    if kind == "lora":
        scale = config["alpha"] / config["r"]
        for factors in loras.values():
            factors.scale = scale
        if config.get("composition_mode", "add") != "add":
            raise ValueError(f"{folder}: composition_mode={config['composition_mode']} is no LoRA")
        return lora_modifications(model, loras, float(config.get("dropout", 0)), folder)
    if kind is None and "reduction_factor" in config:
        return _bottleneck_modifications(model, config, folder)
    raise ValueError(f"{folder} holds {kind}: bottlenecks, lora, prefix_tuning can be read")


def _prefix_modification(model, config: dict, folder) -> Modification:
    if config.get("non_linearity", "tanh") != "tanh" and not config["flat"]:
        raise ValueError(f"{folder}: a prefix MLP has tanh here, not {config['non_linearity']}")
    if config.get("dropout"):
        raise ValueError(f"{folder}: a prefix has no dropout here, got {config['dropout']}")
    where = ["decoder"] + ["encoder"] * (config["encoder_prefix"] or len(stacks_of(model)) == 1)
    where += ["cross"] * config["cross_prefix"]
    return Modification(
        "prefix", "heads", composition="gated", size=config["prefix_length"], where=tuple(where),
        reparameterization="none" if config["flat"] else "mlp",
        mlp_dim=config.get("bottleneck_size") or 1,
    )  # fmt: skip


def _bottleneck_modifications(model, config: dict, folder) -> list[Modification]:
    parallel = config["is_parallel"]
    if config["original_ln_before"] and not parallel:
        raise ValueError(
            f"{folder}: a bottleneck behind the layer's own LayerNorm (original_ln_before, as"
            " seq_bn has it) keeps a residual from in front of it: no point of the paper's grid"
        )
    activation = config["non_linearity"].lower()
    wanted = dict(original_ln_after=True, residual_before_ln=True, stochastic_depth=0.0)
    strange = [key for key, value in wanted.items() if config.get(key, value) != value]
    strange += [] if activation in ACTIVATIONS else ["non_linearity"]
    strange += ["reduction_factor"] if isinstance(config["reduction_factor"], dict) else []
    strange += ["mh_adapter"] if parallel and config["mh_adapter"] else []
    strange += ["dropout"] if config.get("dropout") else []
    if strange:
        what = ", ".join(f"{key}={config[key]}" for key in strange)
        raise ValueError(f"{folder}: {what} of AdapterHub has no place here")
    scaling = config.get("scaling", 1.0)
    learned = {"learned": "learned_scale", "channel": "learned_channel_scale"}
    composition = learned.get(scaling, "add" if scaling == 1 else "scaled")
    hidden = base_of(model).config.hidden_size
    common = dict(
        insertion="parallel" if parallel else "sequential", composition=composition,
        size=int(hidden // config["reduction_factor"]), activation=ACTIVATIONS[activation],
        scale=1.0 if isinstance(scaling, str) else float(scaling),
        layer_norm="in" if config["ln_before"] else "out" if config["ln_after"] else "none",
    )  # fmt: skip
    attended = ("encoder", "decoder") * config["mh_adapter"]
    attended += ("cross",) * config.get("cross_adapter", False)
    found = []
    if attended:
        found.append(Modification("bottleneck", "attention", where=attended, **common))
    if config["output_adapter"]:
        # its parallel adapter reads the stream in front of a pre-norm
        reads = "residual" if parallel else "default"
        found.append(Modification("bottleneck", "ffn", reads=reads, **common))
    return found


def _loras(name: str, tensors: dict[str, Tensor]) -> dict[str, Factors]:
    pattern = rf"(.+)\.loras\.{re.escape(name)}\.lora_A"
    found = {key: re.fullmatch(pattern, key) for key in tensors}
    return {
        match[1]: Factors(tensors[key], tensors[key[:-1] + "B"], 1.0)
        for key, match in found.items() if match
    }  # fmt: skip


def _place_of(model: nn.Module, site: Site, name: str) -> str:
    """The key of a bottleneck in front of ``.adapter_down``."""
    base = base_of(model)
    for stack in stacks_of(model):
        found = re.match(rf"{re.escape(stack.layers)}\.\d+", site.name)
        if found is None:
            continue
        layer, slot = found[0], site.name[found.end() + 1 :]
        outs = {attention.out: attention.kind for attention in stack.attentions}
        if base.config.model_type in _BERT_LIKE:
            place = "attention.output" if slot in outs else "output"
        elif slot in outs:
            place = "cross_attention_adapters" if outs[slot] == "cross" else "attention_adapters"
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
        keys |= {"norm_weight": f"{norm}.weight", "norm_bias": f"{norm}.bias"}
    if isinstance(module.scale, Tensor):
        keys["scale"] = "scaling"
    return {ours: f"{place}.{theirs}" for ours, theirs in keys.items()}


def _bottleneck(model, site: Site, name: str, tensors: dict, prefix: str) -> dict[str, Tensor]:
    keys = bottleneck_keys(model, site, name)
    return {f"{prefix}.{ours}": tensors[key] for ours, key in keys.items() if key in tensors}


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


def _prefix(model, site: Site, name: str, tensors: dict, ours: str) -> dict[str, Tensor]:
    key, bank = prefix_key(model, site, name), site.module
    if bank.prefix is None:
        return {f"{ours}.{mine}": tensors[f"{key}.{theirs}"]
                for mine, theirs in _MLP.items() if f"{key}.{theirs}" in tensors}  # fmt: skip
    flat = tensors.get(f"{key}.control_trans")
    if flat is None or flat.numel() != bank.prefix.numel():
        return {}
    layers, two, heads, size, dim = bank.shape
    return {f"{ours}.prefix": flat.view(size, layers, two, heads, dim).permute(1, 2, 3, 0, 4)}


def _read_head(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The task head saved beside an adapter, where it is the model's."""
    if not any((folder / name).is_file() for name in HEAD_FILES):
        return {}
    own = {
        f"{name}.{path}": parameter.shape
        for name, child in task_head(model).items() for path, parameter in child.named_parameters()
    }  # fmt: skip
    found = read_weights(folder, *HEAD_FILES)
    return {name: t for name, t in found.items() if own.get(name) == t.shape}
