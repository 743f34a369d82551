"""PEFT's files, read without PEFT: LoRA, prefix and prompt.

The files are ``adapter_config.json`` (``peft_config``) and ``adapter_model.safetensors``.
``peft_init`` describes how PEFT changes the base when it loads, ``peft_positions`` how it changes
positions. ``peft_writer`` writes the files.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.injection.trained_names import bias_names
from pelt_fast.layouts.lookup import stacks_of, task_head
from pelt_fast.layouts.names import check_model
from pelt_fast.modules import PrefixBank, Prompt

from .foreign import inject_with_tensors, read_json, read_weights
from .lora_factors import (
    Factors,
    has_layout,
    lora_modifications,
    lora_tensors,
    named_modifications,
)
from .peft_config import READ, check_config, number, scale_of
from .peft_init import check_init, first_factors
from .peft_positions import check_prompt, one_rotary, rotated

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
)  # fmt: skip
PREFIX = "base_model.model."
EMBEDDINGS = "prompt_embeddings"
_BIASES = Modification("bias", "model")


def load_peft(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Inject a LoRA, prefix or prompt that PEFT saved, with its weights and its task head.

    The model computes what PEFT computes after it loads the files. LoRA: rank-stabilised scale,
    rank and alpha patterns, joined projections, any layers that a method here can be on; in a model
    without a table row any linear layers. For PiSSA and OLoRA, PEFT subtracts a part from the base
    when it loads them. Here additional factors subtract that part: the rank is twice the file's,
    and the base does not change. Prefix and prompt: causal language models with rotary positions; a
    prompt of T5, too.

    Args:
        model: a model of the base that the files belong to, without a method.
        folder: what PEFT's ``save_pretrained`` wrote. PEFT is not needed.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the config asks for something else (DoRA, biases of some
            layers, an unknown key); a tensor belongs nowhere (embeddings, an output layer); or
            something does not fit the model. The message names it, and the model is unchanged.

    Example:
        model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        pelt_fast.load_peft(model, "my-peft-lora")
    """
    check_model(model)
    folder = Path(folder)
    about = read_json(folder / CONFIG_FILE)
    tensors = read_weights(folder, WEIGHTS_FILE, OLD_WEIGHTS_FILE)
    kind = about.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise ValueError(f"{folder} holds {kind}: {', '.join(READ)} can be read")
    check_config(about, folder, CONFIG_FILE)
    return _READERS[kind](model, about, tensors, folder)


def _read_lora(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    init = about.get("init_lora_weights", True)
    try:
        check_init(init)
        dropout = float(number(about, "lora_dropout", 0.0))
        pairs, rest = _pairs(tensors)
        modules = dict(model.named_modules())
        layers = {
            name: _reloaded(init, modules.get(name), name, pair["A"], pair["B"], about)
            for name, pair in pairs.items()
        }
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if has_layout(model):
        modifications, placed = lora_modifications(model, layers, dropout, folder, parts=True)
    else:
        modifications, placed = named_modifications(layers, dropout)
    biases = _biases(model, rest, folder) if about.get("bias") == "all" else {}
    modifications += [_BIASES] if biases else []
    head = _head(model, about, {k: t for k, t in rest.items() if k not in biases}, folder)
    others = {key.removeprefix(PREFIX): tensor for key, tensor in rest.items()}
    config = PeltConfig("lora", tuple(modifications), bool(head))

    def tensors_of() -> dict[str, Tensor]:
        return {**lora_tensors(model, placed), **others}

    return inject_with_tensors(model, config, tensors_of, folder)


def _biases(model: nn.Module, rest: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The base's biases among the tensors; ValueError when one is missing."""
    names = bias_names(model, _BIASES, stacks_of(model))
    missing = [name for name in names if f"{PREFIX}{name}" not in rest]
    if missing:
        raise ValueError(f"{folder}: bias='all', and {missing[0]} is not there")
    return {f"{PREFIX}{name}": rest[f"{PREFIX}{name}"] for name in names}


def _pairs(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors by their layers' names, and every other tensor."""
    pairs: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_embedding_" in key:
            raise ValueError(f"{key}: a method here has no LoRA on embeddings")
        else:
            # a layer that carries LoRA has its own tensors one step down
            rest[key.replace(".base_layer.", ".")] = tensor
    single = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if single or not pairs:
        raise ValueError(f"no pair of factors for {single[0] if single else 'any layer'}")
    flat = [name for name, pair in pairs.items() if any(t.dim() != 2 for t in pair.values())]
    if flat:
        raise ValueError(f"the factors of {flat[0]} are no matrices")
    return pairs, rest


def _reloaded(init, layer: nn.Module | None, name: str, a: Tensor, b: Tensor, about) -> Factors:
    """The factors that give, on an unchanged base, what PEFT's layer computes after it loads."""
    rank = a.shape[0]
    scale = scale_of(about, name, rank)
    first = first_factors(init, layer, name, rank, scale)
    if first is None:
        return Factors(a, b, scale)
    first_a, first_b = (t.cpu() for t in first)
    if first_a.shape != a.shape or first_b.shape != b.shape:
        raise ValueError(f"factors {tuple(a.shape)} and {tuple(b.shape)} do not fit {name}")
    return Factors(torch.cat([a.float(), first_a]), torch.cat([b.float(), -first_b], 1), scale)


def _head(model: nn.Module, about: dict, rest: dict[str, Tensor], folder) -> dict[str, Tensor]:
    """The task head's tensors under our names. Raises ValueError for any other tensor, and where a
    module that modules_to_save names is not complete."""
    names = {
        f"{child}.{name}"
        for child, module in task_head(model).items() for name, _ in module.named_parameters()
    }  # fmt: skip
    head = {key.removeprefix(PREFIX): tensor for key, tensor in rest.items()}
    unknown = [key for key in rest if key.removeprefix(PREFIX) not in names]
    if unknown:
        raise ValueError(
            f"{folder}: {', '.join(unknown[:3])} ({len(unknown)} in all) is neither a factor nor of"
            f" the task head of {type(model).__name__}: there is no place for it"
        )
    saved = about.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"{folder}: modules_to_save must be a list of names, got {saved!r}")
    missing = [
        f"{path}.{name}"
        for path, module in model.named_modules() if path and path.endswith(tuple(saved))
        for name, _ in module.named_parameters() if f"{path}.{name}" not in head
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{folder}: modules_to_save names {missing[0]}, and it is not there")
    return head


def _embeddings(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    """The virtual tokens of one stack (P, width). For an encoder-decoder PEFT makes a prompt for
    both stacks and uses the first."""
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{folder}: {EMBEDDINGS} is missing")
    embeddings, is_prompt = tensors[EMBEDDINGS], about["peft_type"] == "PROMPT_TUNING"
    default = 2 if about.get("task_type") == "SEQ_2_SEQ_LM" else 1
    given = about.get("num_transformer_submodules")
    count = default if given is None else given
    two = is_prompt and count == 2 and len(stacks_of(model)) == 2
    if count != 1 and not two:
        raise ValueError(f"{folder} holds a prefix or prompt of {count} stacks: one can be read")
    length = about.get("num_virtual_tokens")
    is_matrix = type(length) is int and embeddings.dim() == 2
    if not is_matrix or embeddings.shape[0] != count * length:
        raise ValueError(
            f"{folder}: {EMBEDDINGS} is {tuple(embeddings.shape)}, num_virtual_tokens says {length}"
        )
    return embeddings[:length]


def _check_numbers(about: dict, folder: Path, **wanted: int) -> None:
    """ValueError where the config says another number than the model."""
    for name, value in wanted.items():
        if about.get(name) not in (None, value):
            raise ValueError(f"{folder}: {name} is {about[name]}, the model's is {value}")


def _other(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != EMBEDDINGS}


def _read_prefix(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    flat = _embeddings(model, about, tensors, folder)
    head = _head(model, about, _other(tensors), folder)
    length = flat.shape[0]
    prefix = Modification("prefix", "heads", composition="gated", size=length,
                          reparameterization="none")  # fmt: skip

    def tensors_of() -> dict[str, Tensor]:
        banks = {n: m for n, m in model.named_modules() if isinstance(m, PrefixBank)}
        (bank,) = one_rotary(model, list(banks.values()))
        layers, two, heads, _, dim = bank.shape
        _check_numbers(
            about, folder, num_layers=layers, num_attention_heads=heads, token_dim=heads * dim
        )
        if flat.shape[1] != layers * two * heads * dim:
            raise ValueError(
                f"{folder}: {EMBEDDINGS} is {flat.shape[1]} wide, {layers} layers of {heads} heads"
                f" of {dim} take {layers * two * heads * dim}"
            )
        both = flat.view(length, layers, two, heads, dim).permute(1, 2, 3, 0, 4)
        keys = rotated(model, both[:, 0].to(bank.prefix.device), -length)
        return {f"{next(iter(banks))}.prefix": torch.stack([keys, both[:, 1].to(keys)], 1), **head}

    config = PeltConfig("prefix", (prefix,), bool(head))
    return inject_with_tensors(model, config, tensors_of, folder)


def _read_prompt(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    check_prompt(model)
    embedding = _embeddings(model, about, tensors, folder)
    head = _head(model, about, _other(tensors), folder)
    _check_numbers(about, folder, token_dim=embedding.shape[1])
    prompt = Modification("prompt", "embeddings", composition="gated", size=embedding.shape[0])

    def tensors_of() -> dict[str, Tensor]:
        names = [name for name, module in model.named_modules() if isinstance(module, Prompt)]
        return {f"{names[0]}.embedding": embedding, **head}

    config = PeltConfig("prompt", (prompt,), bool(head))
    return inject_with_tensors(model, config, tensors_of, folder)


_READERS = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}
