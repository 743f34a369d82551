"""PEFT's files, read without PEFT: LoRA, prefix and prompt as ``adapter_config.json`` and
``adapter_model.safetensors`` hold them. ``peft_config`` knows the config, ``peft_init`` what PEFT
does to the base when it loads, ``peft_export`` writes.

PEFT's prefix and prompt stand in front of the tokens and move their positions. Rotary ones are
relative, so a prefix is the same after turning its keys by its length, and a prompt as it is; with
learned positions PEFT trains another function than the paper's, and is refused.
"""

import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.injection.inject import bias_names
from pelt_fast.layouts.lookup import base_of, stacks_of, task_head
from pelt_fast.modules import PrefixBank, Prompt

from .foreign import Factors, adopt, lora_tensors, place_lora, read_json, read_weights
from .peft_config import READ, check_config, number, scale_of
from .peft_init import check_init, first_factors

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
)  # fmt: skip
PREFIX = "base_model.model."
EMBEDDINGS = "prompt_embeddings"
_BIASES = Modification("bias", "model")


def load_peft(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Inject the LoRA, prefix or prompt that PEFT saved in ``folder``, with its weights and the
    task head that came with it; returns the model. What PEFT reloads to, this computes.

    LoRA: rank-stabilised scale, rank and alpha patterns, any layers a method here can be on, fused
    projections. PiSSA and OLoRA take a part out of the base when PEFT loads them: here it is
    subtracted by factors of its own, so the rank is twice the file's and the base stays as it was.
    Prefix and prompt: causal language models with rotary positions; a prompt of T5 too. Raises
    FileNotFoundError, or ValueError that names what is damaged, what the config says beyond this
    (DoRA, biases of some layers, an unknown key), every tensor that has no place (embeddings,
    an output layer), or what does not fit the model, which is then as it was.
    """
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
    found, placed = place_lora(model, layers, dropout, folder, parts=True)
    biases = _biases(model, rest, folder) if about.get("bias") == "all" else {}
    found += [_BIASES] if biases else []
    head = _head(model, about, {k: t for k, t in rest.items() if k not in biases}, folder)
    own = {key.removeprefix(PREFIX): tensor for key, tensor in rest.items()}
    config = PeltConfig("lora", tuple(found), bool(head))
    return adopt(model, config, lambda: {**lora_tensors(model, placed), **own}, folder)


def _biases(model: nn.Module, rest: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The biases of the base among the tensors: every one it has, or ValueError."""
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
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
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
    """The factors of what PEFT's layer computes after it was loaded, beside an untouched base."""
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
    """The task head's tensors by our names. Raises ValueError for one of anything else, and where
    modules_to_save names a head that is not there whole."""
    own = {
        f"{child}.{name}"
        for child, module in task_head(model).items() for name, _ in module.named_parameters()
    }  # fmt: skip
    head = {key.removeprefix(PREFIX): tensor for key, tensor in rest.items()}
    strange = [key for key in rest if key.removeprefix(PREFIX) not in own]
    if strange:
        raise ValueError(
            f"{folder}: {', '.join(strange[:3])} ({len(strange)} in all) is neither a factor nor of"
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
    """The virtual tokens, of one stack. PEFT makes a prompt for both stacks of an encoder-decoder
    and uses the first."""
    if EMBEDDINGS not in tensors:
        raise ValueError(f"{folder}: {EMBEDDINGS} is missing")
    found, prompt = tensors[EMBEDDINGS], about["peft_type"] == "PROMPT_TUNING"
    default = 2 if about.get("task_type") == "SEQ_2_SEQ_LM" else 1
    given = about.get("num_transformer_submodules")
    count = default if given is None else given
    two = prompt and count == 2 and len(stacks_of(model)) == 2
    if count != 1 and not two:
        raise ValueError(f"{folder} holds a prefix or prompt of {count} stacks: one can be read")
    length = about.get("num_virtual_tokens")
    if type(length) is not int or found.dim() != 2 or found.shape[0] != count * length:
        raise ValueError(
            f"{folder}: {EMBEDDINGS} is {tuple(found.shape)}, num_virtual_tokens says {length}"
        )
    return found[:length]


def _agree(about: dict, folder: Path, **wanted: int) -> None:
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

    def fill() -> dict[str, Tensor]:
        banks = {n: m for n, m in model.named_modules() if isinstance(m, PrefixBank)}
        (bank,) = one_rotary(model, list(banks.values()))
        layers, two, heads, _, dim = bank.shape
        _agree(about, folder, num_layers=layers, num_attention_heads=heads, token_dim=heads * dim)
        if flat.shape[1] != layers * two * heads * dim:
            raise ValueError(
                f"{folder}: {EMBEDDINGS} is {flat.shape[1]} wide, {layers} layers of {heads} heads"
                f" of {dim} take {layers * two * heads * dim}"
            )
        both = flat.view(length, layers, two, heads, dim).permute(1, 2, 3, 0, 4)
        keys = turned(model, both[:, 0].to(bank.prefix.device), -length)
        return {f"{next(iter(banks))}.prefix": torch.stack([keys, both[:, 1].to(keys)], 1), **head}

    return adopt(model, PeltConfig("prefix", (prefix,), bool(head)), fill, folder)


def _read_prompt(model: nn.Module, about: dict, tensors: dict[str, Tensor], folder: Path):
    check_prompt(model)
    embedding = _embeddings(model, about, tensors, folder)
    head = _head(model, about, _other(tensors), folder)
    _agree(about, folder, token_dim=embedding.shape[1])
    prompt = Modification("prompt", "embeddings", composition="gated", size=embedding.shape[0])

    def fill() -> dict[str, Tensor]:
        names = [name for name, module in model.named_modules() if isinstance(module, Prompt)]
        return {f"{names[0]}.embedding": embedding, **head}

    return adopt(model, PeltConfig("prompt", (prompt,), bool(head)), fill, folder)


_READERS = {"LORA": _read_lora, "PREFIX_TUNING": _read_prefix, "PROMPT_TUNING": _read_prompt}


def one_rotary(model: nn.Module, banks: list[PrefixBank]) -> list[PrefixBank]:
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


def check_prompt(model: nn.Module) -> None:
    first = stacks_of(model)[0]
    layout = first.prompt
    if layout is None or layout.norm or layout.layer or layout.positions or layout.strip:
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


def turned(model: nn.Module, keys: Tensor, position: int) -> Tensor:
    """Keys (.., P, D), all turned as the model turns those at ``position``."""
    cos, sin = _angles(model, position)
    half = keys.shape[-1] // 2
    turned = torch.cat([-keys[..., half:], keys[..., :half]], -1)
    return (keys.float() * cos + turned.float() * sin).to(keys.dtype)
