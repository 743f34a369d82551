"""AdapterHub's files, written without ``adapters``."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.record import injection_of, refuse_together
from pelt_fast.layouts.lookup import base_of
from pelt_fast.modules import LoRALinear, PrefixBank

from .adapterhub_keys import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    HEAD_FILES,
    WEIGHTS_FILES,
    bottleneck_keys,
    prefix_key,
)
from .adapterhub_written_config import configs_of
from .files import write_files


def export_adapterhub(model: nn.Module, folder: str | os.PathLike, name: str = "pelt_fast") -> None:
    """Write a method, and the task head that trains with it, in AdapterHub's format.

    Bottlenecks on the FFN and after the attention, LoRA on whole projections, prefixes, and
    combinations of them, on the architectures that :func:`pelt_fast.load_adapterhub` reads.

    Args:
        model: a model with a method, or a wrapper of one.
        folder: made when it is missing.
        name: the name of the adapter in the files.

    Raises:
        ValueError: the format cannot hold the method. Nothing is written.
        OSError: the disk refuses.

    Saved:
        ``adapter_config.json`` and the tensors, as safetensors and as a torch file; a prefix as its
        keys and values. ``load_adapter`` of adapters 1.x reads the folder.

    Example:
        pelt_fast.inject(model, "houlsby")
        pelt_fast.export_adapterhub(model, "my-adapter")
    """
    model = carrier_of(model)
    injection = injection_of(model)
    refuse_together(injection, "export_adapterhub")
    parts, tensors = configs_of(model, injection.config), {}
    names = {module: path for path, module in model.named_modules()}
    for site in injection.sites:
        module = site.module
        if isinstance(module, LoRALinear):
            path = f"{names[module.frozen.module]}.loras.{name}"
            tensors |= {f"{path}.lora_A": module.lora_a, f"{path}.lora_B": module.lora_b}
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
        parameters, labels = dict(model.named_parameters()), model.config
        head = dict(config=None, name=None, num_labels=labels.num_labels, label2id=labels.label2id)
        writers |= _writers(HEAD_FILES, {name: parameters[name] for name in injection.head},
                            HEAD_CONFIG_FILE, head | origin)  # fmt: skip
    write_files(Path(folder), writers, "the adapter", CONFIG_FILE)


def _writers(files: tuple[str, str], tensors: dict, config_file: str, about: dict) -> dict:
    """The writers of tensors, in both file formats, and of the config beside them."""
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    return {
        files[0]: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        files[1]: lambda to: torch.save(tensors, to),
        config_file: lambda to: to.write_text(json.dumps(about, indent=2) + "\n"),
    }
