"""Write LoRA as PEFT keeps it: adapter_config.json and adapter_model.safetensors, which PEFT, vLLM
and what else reads its format can load. Needs no PEFT. (Reading: PEFT, then ``accelerate_peft``.)
"""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from pelt_fast.modules import LoRALinear
from pelt_fast.modules.part import Part

from .checkpoint import write_files
from .slots import base_of
from .takeover import takeover_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


def export_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the LoRA of ``model``, and its task head where one trains, in PEFT's format.

    Raises ValueError, before anything is written, for what the format has no place for: another
    form than LoRA, factors of several ranks, scales or dropouts, a part of a fused projection;
    OSError when the disk refuses.
    """
    takeover = takeover_of(model)
    sites = [site.module for site in takeover.sites]
    if not sites or not all(isinstance(site, LoRALinear) for site in sites) or takeover.biases:
        raise ValueError(
            f"PEFT's format holds LoRA alone: {takeover.config.name!r} is more or less"
        )
    if any(isinstance(site.slot.module, Part) for site in sites):
        raise ValueError("PEFT's format has no LoRA on a part of a fused projection")
    kinds = {(site.lora_a.shape[0], site.scale, site.dropout_p) for site in sites}
    if len(kinds) > 1:
        raise ValueError(
            f"PEFT's format holds one rank, scale and dropout, this method has {len(kinds)}:"
            f" {sorted(kinds)}"
        )
    (rank, scale, dropout), names = kinds.pop(), _names(model)
    targets = [names[site.slot.module] for site in sites]
    heads = sorted({name.split(".")[0] for name in takeover.head})
    config = dict(
        peft_type="LORA", task_type=_task(model), r=rank, lora_alpha=scale * rank,
        lora_dropout=dropout, target_modules=targets, modules_to_save=heads or None, bias="none",
        base_model_name_or_path=base_of(model).config._name_or_path or None, inference_mode=True,
        fan_in_fan_out=False, use_rslora=False, use_dora=False, init_lora_weights=True,
    )  # fmt: skip
    tensors = {}
    for site, target in zip(sites, targets):
        tensors[f"{PREFIX}{target}.lora_A.weight"] = site.lora_a
        tensors[f"{PREFIX}{target}.lora_B.weight"] = site.lora_b
    parameters = dict(model.named_parameters())
    tensors |= {f"{PREFIX}{name}": parameters[name] for name in takeover.head}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_files(Path(folder), {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(config, indent=2) + "\n"),
    }, "the adapter")  # fmt: skip


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _task(model: nn.Module) -> str | None:
    kind = type(model).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)
