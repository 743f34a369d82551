"""AdapterHub's files, written without ``adapters``; the layout is ``adapterhub``'s."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.lookup import base_of, stacks_of
from pelt_fast.modules import LoRALinear, PrefixBank

from .adapterhub_config import ACTIVATIONS, COMPARED
from .adapterhub_reader import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_FILES,
    WEIGHTS_FILES,
    bottleneck_keys,
    prefix_key,
)
from .checkpoint import write_files


def export_adapterhub(model: nn.Module, folder: str | os.PathLike, name: str = "pelt_fast") -> None:
    """Write the method of ``model`` in AdapterHub's format, under ``name``; ``load_adapter`` of
    ``adapters`` 1.x reads it.

    Bottlenecks on the FFN and behind the attention, LoRA on whole projections, prefixes, and their
    combinations, on the architectures ``load_adapterhub`` reads; a prefix is written flat, a task
    head that trains beside it. Raises ValueError, before anything is written, for what the format
    has no place for; OSError when the disk refuses.
    """
    model = carrier_of(model)
    injection = injection_of(model)
    parts, tensors = _configs(model, injection.config), {}
    names = {module: path for path, module in model.named_modules()}
    for site in injection.sites:
        module = site.module
        if isinstance(module, LoRALinear):
            place = f"{names[module.frozen.module]}.loras.{name}"
            tensors |= {f"{place}.lora_A": module.lora_a, f"{place}.lora_B": module.lora_b}
        elif isinstance(module, PrefixBank):
            flat = module().detach().permute(3, 0, 1, 2, 4).flatten()
            tensors[f"{prefix_key(model, site, name)}.control_trans"] = flat
        else:
            keys = bottleneck_keys(model, site, name)
            tensors |= {key: module.get_parameter(ours) for ours, key in keys.items()}
    origin = dict(
        hidden_size=base_of(model).config.hidden_size, model_class=type(model).__name__,
        model_name=base_of(model).config._name_or_path, model_type=base_of(model).config.model_type,
        version="adapters.1.3.0",
    )  # fmt: skip
    config = parts[0] if len(parts) == 1 else dict(architecture="union", configs=parts)
    writers = _writers(
        WEIGHTS_FILES, tensors, CONFIG_FILE, dict(config=config, name=name, **origin)
    )
    if injection.head:
        parameters, own = dict(model.named_parameters()), model.config
        head = dict(config=None, name=None, num_labels=own.num_labels, label2id=own.label2id)
        writers |= _writers(HEAD_FILES, {name: parameters[name] for name in injection.head},
                            HEAD_CONFIG_FILE, head | origin)  # fmt: skip
    write_files(Path(folder), writers, "the adapter", CONFIG_FILE)


def _writers(files: tuple[str, str], tensors: dict, config_file: str, about: dict) -> dict:
    """What writes tensors, in both formats, and the config beside them."""
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    return {
        files[0]: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        files[1]: lambda to: torch.save(tensors, to),
        config_file: lambda to: to.write_text(json.dumps(about, indent=2) + "\n"),
    }


def _configs(model: nn.Module, config: PeltConfig) -> list[dict]:
    loras = [m for m in config.modifications if m.form == "low_rank"]
    bottlenecks = [m for m in config.modifications if m.form == "bottleneck"]
    prefixes = [m for m in config.modifications if m.form == "prefix"]
    others = [m for m in config.modifications if m not in loras + bottlenecks + prefixes]
    if others or not config.modifications:
        raise ValueError(f"AdapterHub's format has no place for {config.name!r} as it stands here")
    if any(m.layers is not None for m in config.modifications):
        raise ValueError("AdapterHub's format is written of methods on every layer alone")
    model_type = base_of(model).config.model_type
    for kind, found in (("prefix_tuning", prefixes), ("lora", loras), ("bottleneck", bottlenecks)):
        if found and model_type not in COMPARED[kind]:
            raise ValueError(
                f"AdapterHub's {kind} is not written for {model_type!r}; it is for"
                f" {', '.join(COMPARED[kind])}"
            )
    if len(prefixes) > 1:
        raise ValueError(f"AdapterHub's format has one prefix, this method has {len(prefixes)}")
    found = [_prefix_config(model, m) for m in prefixes]
    if loras:
        found.append(_lora_config(model, loras))
    if bottlenecks:
        found.append(_bottleneck_config(model, bottlenecks))
    return found


def _prefix_config(model: nn.Module, m: Modification) -> dict:
    if m.composition != "gated":
        raise ValueError("AdapterHub's prefix is gated: an ungated one has no place in its format")
    if len(stacks_of(model)) > 1 and "decoder" not in m.where:
        raise ValueError("AdapterHub's prefix is always on a decoder: this one is not")
    return dict(
        architecture="prefix_tuning", encoder_prefix="encoder" in m.where,
        cross_prefix="cross" in m.where, flat=True, prefix_length=m.size, bottleneck_size=512,
        non_linearity="tanh", dropout=0.0, use_gating=False, shared_gating=True, leave_out=[],
    )  # fmt: skip


def _kinds(model: nn.Module, m: Modification) -> set[str]:
    """Every kind of place that a modification's target has in the model."""
    stacks = stacks_of(model)
    if m.target.startswith("ffn"):
        return {stack.kind for stack in stacks}
    layout = {attention_layout.kind for stack in stacks for attention_layout in stack.attentions}
    return layout if len(stacks) > 1 else layout - {"cross"}


def _lora_config(model: nn.Module, loras: list[Modification]) -> dict:
    letters = [m.target[-1] for m in loras if m.target.startswith("attention")]
    kinds = {(m.size, m.scale, m.dropout) for m in loras}
    everywhere = all(_kinds(model, m) <= set(m.where) for m in loras)
    if "o" in letters or len(kinds) > 1 or not everywhere:
        raise ValueError("AdapterHub's LoRA has one rank, scale and dropout, everywhere, on q, k, v"
                         " and the FFN")  # fmt: skip
    targets = {m.target for m in loras}
    gated = any(stack.ffn is not None and stack.ffn.gate_proj for stack in stacks_of(model))
    if gated and len(letters) < len(loras):
        raise ValueError(
            "AdapterHub's LoRA is on one matrix of a gated FFN alone, here it is on both"
        )
    return dict(
        architecture="lora", selfattn_lora=bool(letters), intermediate_lora="ffn.in" in targets,
        output_lora="ffn.out" in targets, attn_matrices=letters or ["q", "v"], r=loras[0].size,
        alpha=loras[0].scale * loras[0].size, dropout=loras[0].dropout, composition_mode="add",
        init_weights="lora", use_gating=False, use_dora=False, leave_out=[],
    )  # fmt: skip


def _bottleneck_config(model: nn.Module, bottlenecks: list[Modification]) -> dict:
    first, hidden = bottlenecks[0], base_of(model).config.hidden_size
    same = {(m.insertion, m.composition, m.size, m.scale, m.activation, m.layer_norm)
            for m in bottlenecks}  # fmt: skip
    by_target = {m.target: m for m in bottlenecks}
    parallel = first.insertion == "parallel"
    back = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}
    residual = all(stack.ffn is None or stack.ffn.norm is None for stack in stacks_of(model))
    strange = (
        len(same) > 1
        or len(by_target) < len(bottlenecks)
        or first.activation not in back
        or "heads" in by_target
        or (parallel and "attention" in by_target)
        or any(m.placement not in ("default", "after_dropout", "after_output") for m in bottlenecks)
        or not all(m.residual for m in bottlenecks)
        or (parallel and not residual and not _reads_residual(model, by_target["ffn"]))
        or (
            "ffn" in by_target
            and not _kinds(model, by_target["ffn"]) <= set(by_target["ffn"].where)
        )
        or int(hidden // (hidden / first.size)) != first.size
    )
    if strange:
        raise ValueError("AdapterHub's format holds bottlenecks of one size, parallel on the FFN,"
                         " reading the residual stream, or sequential: not these")  # fmt: skip
    scaling = {"learned_scale": "learned", "learned_channel_scale": "channel"}
    where = by_target["attention"].where if "attention" in by_target else ()
    return dict(
        mh_adapter="encoder" in where or "decoder" in where, cross_adapter="cross" in where,
        output_adapter="ffn" in by_target, reduction_factor=hidden / first.size,
        non_linearity=back[first.activation], original_ln_before=False, original_ln_after=True,
        ln_before=first.layer_norm == "in", ln_after=first.layer_norm == "out",
        init_weights="mam_adapter" if first.init == "lora" else "bert", is_parallel=parallel,
        scaling=scaling.get(first.composition, float(first.scale)), use_gating=False,
        residual_before_ln=True, adapter_residual_before_ln=False, dropout=0.0, inv_adapter=None,
        inv_adapter_reduction_factor=None, phm_layer=False, leave_out=[], stochastic_depth=0.0,
    )  # fmt: skip


def _reads_residual(model: nn.Module, m: Modification) -> bool:
    reads = {stack.ffn.adapter_reads if m.reads == "default" else m.reads
             for stack in stacks_of(model)}  # fmt: skip
    return reads == {"residual"}
