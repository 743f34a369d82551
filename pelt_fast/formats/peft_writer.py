"""PEFT's files, written without PEFT. PEFT, vLLM and other readers of the format can load them."""

import json
import os
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import injection_of, refuse_together
from pelt_fast.layouts.lookup import base_of
from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules import LoRALinear, PrefixBank, Prompt
from pelt_fast.modules.projection_view import ProjectionView, shape_of

from .files import write_files
from .fingerprint import identity
from .lora_factors import Factors
from .peft_positions import check_prompt, one_rotary, rotated
from .peft_reader import CONFIG_FILE, EMBEDDINGS, PREFIX, WEIGHTS_FILE

TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


def export_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write a LoRA, prefix or prompt, and the task head that trains with it, in PEFT's format.

    Args:
        model: a model with a method, or a wrapper of one.
        folder: made when it is missing.

    Raises:
        ValueError: the format cannot hold the method: two forms at once or other forms, more than
            one dropout, an ungated prefix, a prefix on some layers only, a prefix or prompt in
            front of learned positions. Nothing is written.
        OSError: the disk refuses.

    Saved:
        ``adapter_config.json`` and ``adapter_model.safetensors``: ``PeftModel.from_pretrained``
        reads the folder.

    Example:
        pelt_fast.inject(model, "lora")
        pelt_fast.export_peft(model, "my-peft-lora")
    """
    model = carrier_of(model)
    injection = injection_of(model)
    refuse_together(injection, "export_peft")
    sites = list(dict.fromkeys(site.module for site in injection.sites))
    kinds = {type(site) for site in sites}
    if injection.biases or len(kinds) != 1 or not kinds <= _WRITERS.keys():
        raise ValueError(
            f"PEFT's format holds LoRA alone, a prefix or a prompt: {injection.config.name!r} is"
            " more or less"
        )
    config, tensors = _WRITERS[kinds.pop()](model, sites)
    head_modules = sorted({name.split(".")[0] for name in injection.head})
    config |= dict(
        task_type=_task(model), modules_to_save=head_modules or None, inference_mode=True,
        base_model_name_or_path=identity(model)[1] or None,
    )  # fmt: skip
    parameters = parameters_of(model)
    tensors |= {f"{PREFIX}{name}": parameters[name] for name in injection.head}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_files(Path(folder), {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(config, indent=2) + "\n"),
    }, "the adapter", CONFIG_FILE)  # fmt: skip


def _write_lora(model: nn.Module, sites: list[LoRALinear]) -> tuple[dict, dict]:
    dropouts = {site.dropout_p for site in sites}
    if len(dropouts) > 1:
        raise ValueError(
            f"PEFT's format holds one dropout, this method has {len(dropouts)}: {sorted(dropouts)}"
        )
    layers = _layers(model, sites)
    # the most frequent rank and alpha are the config's, the others are in patterns
    ranks = {name: f.a.shape[0] for name, f in layers.items()}
    alphas = {name: f.scale * ranks[name] for name, f in layers.items()}
    rank, alpha = (Counter(numbers.values()).most_common(1)[0][0] for numbers in (ranks, alphas))
    config = dict(
        peft_type="LORA", r=rank, lora_alpha=alpha, lora_dropout=dropouts.pop(),
        target_modules=list(layers), bias="none", fan_in_fan_out=False, use_rslora=False,
        use_dora=False, init_lora_weights=True,
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )  # fmt: skip
    tensors = {}
    for name, factors in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.b
    return config, tensors


def _layers(model: nn.Module, sites: list[LoRALinear]) -> dict[str, Factors]:
    """The factors of each layer by its name. Those on projections of one matrix are joined."""
    names = {module: name for name, module in model.named_modules()}
    by_layer: dict[str, list[LoRALinear]] = {}
    for site in sites:
        linear = site.frozen.module
        owner = linear.owner if isinstance(linear, ProjectionView) else linear
        by_layer.setdefault(names[owner], []).append(site)
    return {name: _joined(group) for name, group in by_layer.items()}


@torch.no_grad()
def _joined(sites: list[LoRALinear]) -> Factors:
    """The A's under each other, the B's on a block diagonal."""
    linear = sites[0].frozen.module
    if not isinstance(linear, ProjectionView) or linear.which is None:
        return Factors(sites[0].lora_a, sites[0].lora_b, sites[0].scale)
    a = torch.cat([site.lora_a for site in sites])
    b, first = a.new_zeros(shape_of(ProjectionView(linear.owner, "", None))[0], a.shape[0]), 0
    scales = {site.scale for site in sites}
    scale = scales.pop() if len(scales) == 1 else 1.0
    for site in sites:
        rank = site.lora_a.shape[0]
        b[site.frozen.module.rows, first : first + rank] = site.lora_b * (site.scale / scale)
        first += rank
    return Factors(a, b, scale)


def _write_prefix(model: nn.Module, sites: list[PrefixBank]) -> tuple[dict, dict]:
    (bank,) = one_rotary(model, sites)
    prefix = next(m for m in injection_of(model).config.modifications if m.form == "prefix")
    if prefix.composition != "gated" or prefix.layers is not None:
        what = (
            f"on layers {prefix.layers}" if prefix.layers else f"composed by {prefix.composition!r}"
        )
        raise ValueError(f"PEFT's prefix is gated and on every layer: this one is {what}")
    layers, _, heads, length, dim = bank.shape
    with torch.no_grad():
        keys, values = bank().unbind(1)  # (L, Hkv, P, D)
        both = torch.stack([rotated(model, keys, length), values], 1)
    config = dict(
        peft_type="PREFIX_TUNING", num_virtual_tokens=length, token_dim=heads * dim,
        num_layers=layers, num_attention_heads=heads, num_transformer_submodules=1,
        prefix_projection=False, encoder_hidden_size=heads * dim,
    )  # fmt: skip
    return config, {EMBEDDINGS: both.permute(3, 0, 1, 2, 4).flatten(1)}


def _write_prompt(model: nn.Module, sites: list[Prompt]) -> tuple[dict, dict]:
    check_prompt(model)
    (length, width), base = sites[0].embedding.shape, base_of(model).config
    config = dict(
        peft_type="PROMPT_TUNING", num_virtual_tokens=length, token_dim=width,
        num_layers=base.num_hidden_layers, num_attention_heads=base.num_attention_heads,
        num_transformer_submodules=1, prompt_tuning_init="RANDOM",
    )  # fmt: skip
    return config, {EMBEDDINGS: sites[0].embedding}


_WRITERS = {LoRALinear: _write_lora, PrefixBank: _write_prefix, Prompt: _write_prompt}


def _task(model: nn.Module) -> str | None:
    kind = type(model).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)
