"""The names of AdapterHub's files, and the keys of its tensors, as adapters 1.x writes them.

A bottleneck is ``{layer}.{position}.adapters.{name}.adapter_down.0`` (``.1`` after a LayerNorm) and
``.adapter_up``. The position is ``output`` or ``attention.output`` in BERT's family, elsewhere
``output_adapters``, ``attention_adapters`` or ``cross_attention_adapters``. LoRA is
``{projection}.loras.{name}.lora_A``. A prefix is ``{base}.prefix_tuning.prefix_tunings.{name}.
{self,encoder,cross}_prefix``, repeated under every attention that shares it.
"""

import re

from torch import Tensor, nn

from pelt_fast.injection.record import Site
from pelt_fast.layouts.lookup import base_of, stacks_of

CONFIG_FILE, HEAD_CONFIG_FILE = "adapter_config.json", "head_config.json"
WEIGHTS_FILES = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_FILES = "model_head.safetensors", "pytorch_model_head.bin"
_BERT_LIKE = ("bert", "roberta", "electra", "xlm-roberta")
_T5_LIKE = ("t5", "mt5")
_PREFIXES = {"encoder": "encoder_prefix", "decoder": "self_prefix", "cross": "cross_prefix"}


def _bottleneck_path(model: nn.Module, site: Site, name: str) -> str:
    """The key of a bottleneck up to ``.adapter_down``."""
    base = base_of(model)
    for stack in stacks_of(model):
        match = re.match(rf"{re.escape(stack.layers)}\.\d+", site.name)
        if match is None:
            continue
        layer, path = match[0], site.name[match.end() + 1 :]
        outs = {attention.out: attention.kind for attention in stack.attentions}
        if base.config.model_type in _T5_LIKE:
            position = ".".join(path.split(".")[:2])
        elif base.config.model_type in _BERT_LIKE:
            position = "attention.output" if path in outs else "output"
        elif path in outs:
            position = "cross_attention_adapters" if outs[path] == "cross" else "attention_adapters"
        else:
            position = "output_adapters"
        start = f"{model.base_model_prefix}." if base is not model else ""
        return f"{start}{layer}.{position}.adapters.{name}"
    raise ValueError(f"{site.name} is in no stack of {type(model).__name__}")


def bottleneck_keys(model: nn.Module, site: Site, name: str) -> dict[str, str]:
    """AdapterHub's keys of a bottleneck's tensors, by our names."""
    path, module = _bottleneck_path(model, site, name), site.module
    down = 1 if module.layer_norm == "in" else 0
    keys = {"down_weight": f"adapter_down.{down}.weight", "down_bias": f"adapter_down.{down}.bias",
            "up_weight": "adapter_up.weight", "up_bias": "adapter_up.bias"}  # fmt: skip
    if module.layer_norm != "none":
        norm = "adapter_norm_before" if module.layer_norm == "in" else "adapter_norm_after"
        keys |= {"norm.weight": f"{norm}.weight", "norm.bias": f"{norm}.bias"}
    if isinstance(module.scale, Tensor):
        keys["scale"] = "scaling"
    return {ours: f"{path}.{theirs}" for ours, theirs in keys.items()}


def prefix_key(model: nn.Module, site: Site, name: str) -> str:
    """The key of a prefix, up to the names of its tensors."""
    single = len(stacks_of(model)) == 1
    start = f"{model.base_model_prefix}." if base_of(model) is not model else ""
    part = "self_prefix" if single else _PREFIXES[_kind(model, site)]
    return f"{start}prefix_tuning.prefix_tunings.{name}.{part}"


def _kind(model: nn.Module, site: Site) -> str:
    for stack in stacks_of(model):
        for attention in stack.attentions:
            layer, module = map(re.escape, (stack.layers, attention.module))
            if re.fullmatch(rf"{layer}\.\d+\.{module}", site.name):
                return attention.kind
    raise ValueError(f"{site.name} is no attention of {type(model).__name__}")
