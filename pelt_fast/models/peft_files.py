"""PEFT's files, read and written without PEFT: LoRA, prefix and prompt as ``adapter_config.json``
and ``adapter_model.safetensors``, which PEFT, vLLM and what else reads the format can load.

PEFT's prefix and prompt stand in front of the tokens and move their positions. Rotary ones are
relative, so a prefix is the same after turning its keys by its length, and a prompt as it is; with
learned positions PEFT trains another function than the paper's, and is refused.
"""

import json
import math
import os
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.modules import LoRALinear, PrefixBank, Prompt
from pelt_fast.modules.part import Part

from .adopt import (
    Factors,
    adopt,
    lora_modifications,
    lora_tensors,
    read_json,
    read_weights,
)
from .checkpoint import write_files
from .slots import base_of, stacks_of
from .takeover import takeover_of

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
)  # fmt: skip
PREFIX = "base_model.model."
EMBEDDINGS = "prompt_embeddings"
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip
# what makes of LoRA another method
_VARIANTS = ("use_dora", "use_qalora", "lora_bias", "megatron_config", "trainable_token_indices")


def export_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the LoRA, prefix or prompt of ``model``, and its task head where one trains, in PEFT's
    format.

    Raises ValueError, before anything is written, for what the format has no place for: two forms
    at once or others, factors of several ranks, scales or dropouts, a part of a fused projection, a
    prefix or prompt in front of learned positions; OSError when the disk refuses.
    """
    takeover = takeover_of(model)
    sites = list(dict.fromkeys(site.module for site in takeover.sites))
    kinds = {type(site) for site in sites}
    if takeover.biases or len(kinds) != 1 or not kinds <= _WRITERS.keys():
        raise ValueError(
            f"PEFT's format holds LoRA alone, a prefix or a prompt: {takeover.config.name!r} is"
            " more or less"
        )
    config, tensors = _WRITERS[kinds.pop()](model, sites)
    heads = sorted({name.split(".")[0] for name in takeover.head})
    config |= dict(
        task_type=_task(model), modules_to_save=heads or None, inference_mode=True,
        base_model_name_or_path=base_of(model).config._name_or_path or None,
    )  # fmt: skip
    parameters = dict(model.named_parameters())
    tensors |= {f"{PREFIX}{name}": parameters[name] for name in takeover.head}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_files(Path(folder), {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(config, indent=2) + "\n"),
    }, "the adapter")  # fmt: skip


def _write_lora(model: nn.Module, sites: list[LoRALinear]) -> tuple[dict, dict]:
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
    config = dict(
        peft_type="LORA", r=rank, lora_alpha=scale * rank, lora_dropout=dropout,
        target_modules=targets, bias="none", fan_in_fan_out=False, use_rslora=False,
        use_dora=False, init_lora_weights=True,
    )  # fmt: skip
    tensors = {}
    for site, target in zip(sites, targets):
        tensors[f"{PREFIX}{target}.lora_A.weight"] = site.lora_a
        tensors[f"{PREFIX}{target}.lora_B.weight"] = site.lora_b
    return config, tensors


def _write_prefix(model: nn.Module, sites: list[PrefixBank]) -> tuple[dict, dict]:
    (bank,) = _one_rotary(model, sites)
    layers, _, heads, length, dim = bank.shape
    with torch.no_grad():
        keys, values = bank().unbind(1)  # (L, Hkv, P, D)
        both = torch.stack([_turned(model, keys, length), values], 1)
    config = dict(
        peft_type="PREFIX_TUNING", num_virtual_tokens=length, token_dim=heads * dim,
        num_layers=layers, num_attention_heads=heads, num_transformer_submodules=1,
        prefix_projection=False, encoder_hidden_size=heads * dim,
    )  # fmt: skip
    return config, {EMBEDDINGS: both.permute(3, 0, 1, 2, 4).flatten(1)}


def _write_prompt(model: nn.Module, sites: list[Prompt]) -> tuple[dict, dict]:
    _check_prompt(model)
    (length, width), base = sites[0].embedding.shape, base_of(model).config
    config = dict(
        peft_type="PROMPT_TUNING", num_virtual_tokens=length, token_dim=width,
        num_layers=base.num_hidden_layers, num_attention_heads=base.num_attention_heads,
        num_transformer_submodules=1, prompt_tuning_init="RANDOM",
    )  # fmt: skip
    return config, {EMBEDDINGS: sites[0].embedding}


_WRITERS = {LoRALinear: _write_lora, PrefixBank: _write_prefix, Prompt: _write_prompt}


def load_peft(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Inject the LoRA, prefix or prompt that PEFT saved in ``folder``, with its weights and the
    task head that came with it; returns the model. What PEFT computes, this computes.

    LoRA: rank-stabilised scale, rank and alpha patterns, any targets that a method here has on
    every layer. Prefix and prompt: causal language models with rotary positions; a prompt of T5
    too. Raises FileNotFoundError, or ValueError with the reason for what is damaged, another
    method (DoRA, trained biases), or does not fit the model, which is then as it was.
    """
    folder = Path(folder)
    about = read_json(folder / CONFIG_FILE)
    tensors = read_weights(folder, WEIGHTS_FILE, OLD_WEIGHTS_FILE)
    kind = about.get("peft_type")
    if kind not in _READERS:
        raise ValueError(f"{folder} holds {kind}: {', '.join(_READERS)} can be read")
    return _READERS[kind](model, about, tensors, folder)


def _read_lora(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    variants = [name for name in _VARIANTS if about.get(name)]
    variants += ["bias"] if about.get("bias", "none") != "none" else []
    if variants:
        raise ValueError(f"{folder} is not plain LoRA: {', '.join(variants)} in {CONFIG_FILE}")
    pairs: dict[str, dict[str, Tensor]] = {}
    head = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            head[key.removeprefix(PREFIX)] = tensor
    single = [name for name, pair in pairs.items() if pair.keys() != {"A", "B"}]
    if single or not pairs:
        raise ValueError(f"{folder}: no pair of factors for {single[0] if single else 'any layer'}")
    layers = {
        name: Factors(pair["A"], pair["B"], _scale(about, name, pair["A"].shape[0]))
        for name, pair in pairs.items()
    }
    dropout = float(about.get("lora_dropout") or 0.0)
    found = lora_modifications(model, layers, dropout, folder)
    config = PeltConfig("lora", tuple(found), bool(head))
    return adopt(model, config, lambda: {**lora_tensors(model, layers), **head}, folder)


def _scale(about: dict, name: str, rank: int) -> float:
    alpha = about.get("lora_alpha", 8)
    for pattern, value in (about.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _embeddings(about: dict, tensors: dict[str, Tensor], folder: Path) -> Tensor:
    if about.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{folder} holds a prefix or prompt of two stacks: one can be read")
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{folder}: {EMBEDDINGS} is missing")
    return tensors[EMBEDDINGS]


def _head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(PREFIX): t for k, t in tensors.items() if k != EMBEDDINGS}


def _read_prefix(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    flat, head = _embeddings(about, tensors, folder), _head(tensors)
    length = flat.shape[0]
    prefix = Modification("prefix", "heads", composition="gated", size=length,
                          reparameterization="none")  # fmt: skip

    def fill() -> dict[str, Tensor]:
        banks = {n: m for n, m in model.named_modules() if isinstance(m, PrefixBank)}
        (bank,) = _one_rotary(model, list(banks.values()))
        layers, two, heads, _, dim = bank.shape
        if flat.shape[1] != layers * two * heads * dim:
            raise ValueError(
                f"{folder}: {EMBEDDINGS} is {flat.shape[1]} wide, {layers} layers of {heads} heads"
                f" of {dim} take {layers * two * heads * dim}"
            )
        both = flat.view(length, layers, two, heads, dim).permute(1, 2, 3, 0, 4)
        keys = _turned(model, both[:, 0].to(bank.prefix.device), -length)
        return {f"{next(iter(banks))}.prefix": torch.stack([keys, both[:, 1].to(keys)], 1), **head}

    return adopt(model, PeltConfig("prefix", (prefix,), bool(head)), fill, folder)


def _read_prompt(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    _check_prompt(model)
    embedding, head = _embeddings(about, tensors, folder), _head(tensors)
    prompt = Modification("prompt", "embeddings", composition="gated", size=embedding.shape[0])

    def fill() -> dict[str, Tensor]:
        names = [name for name, module in model.named_modules() if isinstance(module, Prompt)]
        return {f"{names[0]}.embedding": embedding, **head}

    return adopt(model, PeltConfig("prompt", (prompt,), bool(head)), fill, folder)


_READERS = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}


def _one_rotary(model: nn.Module, banks: list[PrefixBank]) -> list[PrefixBank]:
    """The one prefix of a decoder with rotary positions, ValueError where there is another."""
    stacks = stacks_of(model)
    rotary = getattr(base_of(model), "rotary_emb", None)
    one = len(banks) == len(stacks) == 1 and stacks[0].kind == "decoder"
    if not one or rotary is None or _angles(model, 1)[0].shape[-1] != banks[0].shape[-1]:
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} is another function than the paper's: it"
            " moves the tokens' positions, and only whole rotary ones, of a decoder alone, are"
            " relative"
        )
    if getattr(base_of(model).config, "sliding_window", None):
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} falls out of a window of"
            f" {base_of(model).config.sliding_window} tokens, the paper's is seen by every one"
        )
    return banks


def _check_prompt(model: nn.Module) -> None:
    first = stacks_of(model)[0]
    slot = first.prompt
    if slot is None or slot.norm or slot.layer or slot.positions or slot.strip:
        raise ValueError(
            f"PEFT's prompt on {type(model).__name__} takes learned positions, or others'; the"
            " paper's takes none: they are two functions"
        )


def _angles(model: nn.Module, position: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, D) by which the model turns keys at ``position``, of length one."""
    base = base_of(model)
    like = base.get_input_embeddings().weight
    where = torch.tensor([[abs(position)]], device=like.device)
    found = base.rotary_emb(like[:1].float()[None], where)
    cos, sin = (t[0].float() for t in found)
    length = (cos**2 + sin**2).sqrt()
    return cos / length, sin / length * (1 if position >= 0 else -1)


def _turned(model: nn.Module, keys: Tensor, position: int) -> Tensor:
    """Keys (.., P, D), all turned as the model turns those at ``position``."""
    cos, sin = _angles(model, position)
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    return (keys.float() * cos + turned.float() * sin).to(keys.dtype)


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def _task(model: nn.Module) -> str | None:
    kind = type(model).__name__
    return next((task for end, task in TASKS.items() if kind.endswith(end)), None)
