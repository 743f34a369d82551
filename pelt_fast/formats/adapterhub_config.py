"""The keys of AdapterHub's configs, and the modifications that a config describes.

Every other key is refused by name, unless it is known to change nothing or its value is empty.
"""

from pathlib import Path

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.lookup import base_of, find, stacks_of

ACTIVATIONS = {"relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "tanh": "tanh",
                "gelu_new": "gelu_tanh"}  # fmt: skip
# the architectures on which a method was compared with adapters' own
COMPARED = {
    "bottleneck": ("bart", "bert", "electra", "llama", "mbart", "mistral", "mt5", "roberta", "t5",
                   "xlm-roberta"),
    "lora": ("bart", "bert", "electra", "llama", "mbart", "mistral", "mt5", "roberta", "t5",
             "xlm-roberta"),
    "prefix_tuning": ("bart", "bert", "electra", "llama", "mbart", "mistral", "roberta",
                      "xlm-roberta"),
}  # fmt: skip
_LEARNED = {"learned": "learned_scale", "channel": "learned_channel_scale"}

# for each kind of config: the keys that are read below
_READ = {
    "bottleneck": ("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor",
                   "non_linearity", "is_parallel", "scaling", "original_ln_before",
                   "original_ln_after", "ln_before", "ln_after", "residual_before_ln",
                   "adapter_residual_before_ln", "leave_out"),
    "lora": ("r", "alpha", "dropout", "composition_mode", "init_weights"),
    "prefix_tuning": ("encoder_prefix", "cross_prefix", "flat", "prefix_length", "bottleneck_size",
                      "non_linearity", "leave_out"),
}  # fmt: skip
_HARMLESS = {
    # of a hypercomplex layer (phm_layer selects it) and of an invertible adapter (inv_adapter)
    "bottleneck": ("init_weights", "init_weights_seed", "phm_dim", "factorized_phm_W",
                   "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init",
                   "phm_init_range", "learn_phm", "hypercomplex_nonlinearity", "phm_rank",
                   "phm_bias", "inv_adapter_reduction_factor"),
    # which layers: the names of the tensors say it, too
    "lora": ("selfattn_lora", "intermediate_lora", "output_lora", "attn_matrices", "leave_out",
             "init_weights_seed", "dtype"),
    "prefix_tuning": ("shared_gating", "init_weights_seed"),
}  # fmt: skip
_FILE_KEYS = ("config", "config_id", "name", "version", "hidden_size", "model_class", "model_name",
              "model_type")  # fmt: skip


def parts_of(about: dict, folder: Path) -> list[dict]:
    """The configs in a file: a union has several."""
    config = about["config"]
    _refuse_others(about, _FILE_KEYS, folder)
    if config.get("architecture") != "union":
        return [config]
    _refuse_others(config, ("architecture", "configs"), folder)
    return config["configs"]


def kind_of(config: dict, folder: Path) -> str:
    """The kind of one config; ValueError for one that cannot be read here."""
    kind = config.get("architecture")
    if kind is None and "reduction_factor" in config:
        kind = "bottleneck"
    if kind not in _READ:
        raise ValueError(f"{folder} holds {kind}: bottlenecks, lora, prefix_tuning can be read")
    return kind


def check_config(model: nn.Module, config: dict, folder: Path) -> str:
    """The kind of one config. Raises ValueError that names every key that is not understood and is
    not empty, and for a model on which the kind was not compared."""
    kind = kind_of(config, folder)
    _refuse_others(config, ("architecture", *_READ[kind], *_HARMLESS[kind]), folder)
    model_type = base_of(model).config.model_type
    if model_type not in COMPARED[kind]:
        why = ""
        if kind == "prefix_tuning" and model_type in COMPARED["bottleneck"]:
            why = ", whose position bias counts AdapterHub's prefix: another function than here"
        raise ValueError(
            f"{folder}: AdapterHub's {kind} is not read for {model_type!r}{why}; it is for"
            f" {', '.join(COMPARED[kind])}"
        )
    return kind


def _refuse_others(config: dict, known: tuple[str, ...], folder: Path) -> None:
    unknown = {k: v for k, v in config.items() if k not in known and not _is_empty(v)}
    if unknown:
        what = ", ".join(f"{key}={value}" for key, value in unknown.items())
        raise ValueError(f"{folder}: {what} of AdapterHub has no place here")


def _is_empty(value) -> bool:
    if isinstance(value, (str, list, dict)):
        return not value
    return value is None or value is False or (isinstance(value, float) and value == 0)


def lora_scale(config: dict, folder: Path) -> float:
    """The scale of a LoRA config; ValueError where it is another method (IA3, VeRA)."""
    mode, init = config.get("composition_mode", "add"), config.get("init_weights", "lora")
    if mode != "add" or init not in ("lora", "bert"):
        raise ValueError(f"{folder}: composition_mode={mode}, init_weights={init} is no LoRA")
    return config["alpha"] / config["r"]


def prefix_modifications(model: nn.Module, config: dict, folder: Path) -> list[Modification]:
    """The prefixes of a config: one, or one for each stack where layers are left out."""
    if config.get("non_linearity", "tanh") != "tanh" and not config["flat"]:
        raise ValueError(f"{folder}: a prefix MLP has tanh here, not {config['non_linearity']}")
    where = ["decoder"] + ["encoder"] * (config["encoder_prefix"] or len(stacks_of(model)) == 1)
    where += ["cross"] * config["cross_prefix"]
    return [
        Modification(
            "prefix", "heads", composition="gated", size=config["prefix_length"], where=kinds,
            reparameterization="none" if config["flat"] else "mlp",
            mlp_dim=config.get("bottleneck_size") or 1, layers=layers,
        )
        for kinds, layers in _kept(model, config.get("leave_out"), tuple(where), folder)
    ]  # fmt: skip


def bottleneck_modifications(model: nn.Module, config: dict, folder: Path) -> list[Modification]:
    """The adapters of a config, on the attention and on the FFN."""
    _check_bottleneck(config, folder)
    common, leave_out = _common_fields(model, config), config.get("leave_out")
    attended = ("encoder", "decoder") * bool(config["mh_adapter"])
    attended += ("cross",) * bool(config.get("cross_adapter", False))
    on_attention = [
        Modification("bottleneck", "attention", where=kinds, layers=layers, **common)
        for kinds, layers in _kept(model, leave_out, attended, folder)
    ]
    # AdapterHub's parallel adapter reads the residual stream before the norm
    reads = "residual" if config["is_parallel"] else "default"
    kinds = ("encoder", "decoder", "cross") * bool(config["output_adapter"])
    return on_attention + [
        Modification("bottleneck", "ffn", reads=reads, where=kinds, layers=layers, **common)
        for kinds, layers in _kept(model, leave_out, kinds, folder)
    ]


def _common_fields(model: nn.Module, config: dict) -> dict:
    """The fields that the adapters of a config share."""
    scaling = config.get("scaling", 1.0)
    return dict(
        insertion="parallel" if config["is_parallel"] else "sequential",
        composition=_LEARNED.get(scaling, "add" if scaling == 1 else "scaled"),
        size=int(base_of(model).config.hidden_size // config["reduction_factor"]),
        activation=ACTIVATIONS[config["non_linearity"].lower()],
        scale=1.0 if isinstance(scaling, str) else float(scaling),
        layer_norm="in" if config["ln_before"] else "out" if config["ln_after"] else "none",
    )


def _check_bottleneck(config: dict, folder: Path) -> None:
    """ValueError for a bottleneck outside our design space."""
    parallel = config["is_parallel"]
    if config["original_ln_before"] and not parallel:
        raise ValueError(
            f"{folder}: a bottleneck behind the layer's own LayerNorm (original_ln_before, as"
            " seq_bn has it) keeps a residual from in front of it: no point of the paper's grid"
        )
    wanted = dict(original_ln_after=True, residual_before_ln=True)
    unfit = [key for key, value in wanted.items() if config.get(key, value) is not value]
    unfit += [] if config["non_linearity"].lower() in ACTIVATIONS else ["non_linearity"]
    unfit += ["reduction_factor"] if isinstance(config["reduction_factor"], dict) else []
    unfit += ["mh_adapter"] if parallel and config["mh_adapter"] else []
    unfit += ["cross_adapter"] if parallel and config.get("cross_adapter") else []
    moved = config["ln_after"] and config.get("adapter_residual_before_ln")
    unfit += ["adapter_residual_before_ln"] if moved else []
    if unfit:
        what = ", ".join(f"{key}={config[key]}" for key in unfit)
        raise ValueError(f"{folder}: {what} of AdapterHub has no place here")
    if config["ln_before"] and config["ln_after"]:
        raise ValueError(f"{folder}: an adapter has one LayerNorm here, not two")


def _kept(model, leave_out, where: tuple[str, ...], folder) -> list[tuple[tuple, tuple | None]]:
    """The kinds of stacks and the layers of a modification: one entry, or one for each stack where
    layers are left out. AdapterHub numbers all layers in one sequence, the encoder's first."""
    if not where or not leave_out:
        return [(where, None)] if where else []
    base, first, entries = base_of(model), 0, []
    for stack in stacks_of(model):
        count = len(find(base, stack.layers))
        kept = tuple(i for i in range(count) if first + i not in leave_out)
        kinds = tuple(k for k in where if (k == "encoder") == (stack.kind == "encoder"))
        if kinds and kept:
            entries.append((kinds, None if len(kept) == count else kept))
        first += count
    if not all(type(i) is int and 0 <= i < first for i in leave_out):
        raise ValueError(f"{folder}: leave_out={leave_out}, the model has {first} layers")
    return entries
