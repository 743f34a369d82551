"""The keys of PEFT's ``adapter_config.json``: which are read, and which change nothing.

Some make LoRA another method. Those, and every key that is not known, are refused by name, unless
their value is empty.
"""

import math
import re
from pathlib import Path

# where the file comes from
_ORIGIN = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
           "inference_mode")  # fmt: skip
# which layers PEFT chose: the names of the tensors say it, too
_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# how the values began; the file holds the trained ones
_BEGAN = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
# how PEFT stores and runs it; it takes fan_in_fan_out from the layer, not from the file
_RUNNING = ("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
            "merge_weights")  # fmt: skip

HARMLESS = {
    "LORA": (*_ORIGIN, *_CHOICE, *_BEGAN, *_RUNNING),
    # the MLP is folded into the embeddings that are saved
    "PREFIX_TUNING": (*_ORIGIN, "prefix_projection", "encoder_hidden_size", "init_weights"),
    # a prompt goes in front of the first layer of any kind
    "PROMPT_TUNING": (
        *_ORIGIN, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
        "tokenizer_kwargs", "num_layers", "num_attention_heads",
    ),
}  # fmt: skip
READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
             "init_lora_weights", "bias"),
    "PREFIX_TUNING": ("num_virtual_tokens", "token_dim", "num_transformer_submodules",
                      "num_attention_heads", "num_layers"),
    "PROMPT_TUNING": ("num_virtual_tokens", "token_dim", "num_transformer_submodules"),
}  # fmt: skip
# LoRA is plain when these are empty
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA pools its input",
    "lora_bias": "its second factor has a bias",
    "alora_invocation_tokens": "aLoRA works behind its invocation tokens alone",
    "arrow_config": "Arrow routes each token",
    "kasa_config": "KaSA learns singular values",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA compresses what backward reads",
    "use_bdlora": "BD-LoRA has blocks for factors",
    "megatron_config": "its layers are Megatron's",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it is on parameters that are no layer's",
    "trainable_token_indices": "it trains tokens' embeddings",
    "ensure_weight_tying": "it ties what it saves",
}
_ALWAYS = ("peft_type", "modules_to_save")


def check_config(about: dict, folder: Path, file: str) -> None:
    """ValueError that names every key that is not understood and is not empty."""
    kind = about["peft_type"]
    known = (*_ALWAYS, *READ[kind], *HARMLESS[kind])
    unknown = {k: v for k, v in about.items() if k not in known and not _is_empty(v)}
    if kind == "LORA" and about.get("bias", "none") not in ("none", "all"):
        unknown["bias"] = about["bias"]
    if not unknown:
        return
    plain = "plain LoRA" if kind == "LORA" else kind
    what = ", ".join(f"{key}={_short(value)}{_why(key)}" for key, value in unknown.items())
    raise ValueError(f"{folder} is not {plain}: {what} in {file}")


def _why(key: str) -> str:
    if key == "bias":
        return " (it trains the biases of some layers alone)"
    return f" ({VARIANTS[key]})" if key in VARIANTS else " (this pelt_fast does not know the key)"


def _is_empty(value) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(about: dict, key: str, default: float) -> float:
    """A number in the config; ValueError when the value is no number."""
    value = about.get(key, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a number, got {_short(value)}")
    return value


def scale_of(about: dict, name: str, rank: int) -> float:
    """The scale of the LoRA on the layer ``name``, by PEFT's own rule: the first key of
    rank_pattern and of alpha_pattern that matches counts."""
    wanted = _chosen(about, "rank_pattern", name, number(about, "r", 8))
    if wanted != rank:
        raise ValueError(f"the factors of {name} are of rank {rank}, the config says {wanted}")
    alpha = _chosen(about, "alpha_pattern", name, number(about, "lora_alpha", 8))
    stable = about.get("use_rslora", False)
    if stable not in (None, False, True):
        raise ValueError(f"use_rslora must be true or false, got {_short(stable)}")
    return alpha / (math.sqrt(rank) if stable else rank)


def _chosen(about: dict, key: str, name: str, default: float) -> float:
    """What a pattern says about a layer: the value of the first regular expression that matches the
    name, or its end after a dot."""
    patterns = about.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} must be an object, got {_short(patterns)}")
    try:
        key_found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), name)
    except re.error as error:
        raise ValueError(f"{key}: no regular expression: {error}") from None
    return number(patterns, key_found, default)
