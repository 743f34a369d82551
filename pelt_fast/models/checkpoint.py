"""save and load: the method's tensors and a JSON, never the base.

``pelt_config.json`` holds the format version, the config and what base it belongs to;
``pelt_model.safetensors`` the method's tensors and the task head's. A prefix is stored as its keys
and values: its reparameterisation ends with training. Both files are written beside their final
names and moved there when whole. What FSDP2 sharded is gathered: every process calls, the first
writes.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.modules import PrefixBank

from .count import is_method
from .inject import eject, inject
from .sharded import is_sharded, like, resharded, whole, writes
from .slots import SlotMap, base_of
from .takeover import takeover_of

FORMAT_VERSION = 1
CONFIG_FILE = "pelt_config.json"
WEIGHTS_FILE = "pelt_model.safetensors"
TRAINED_FILE = "pelt_training.safetensors"


def fingerprint(model: nn.Module) -> str:
    """A digest of the base's parameter names and shapes (not of their values)."""
    lines = sorted(
        f"{name} {tuple(parameter.shape)}"
        for name, parameter in base_of(model).named_parameters()
        if not is_method(name)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def method_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`save` stores, by name: the method folded, and the trained task head."""
    takeover = takeover_of(model)
    if takeover.config.is_full:
        return {name: whole(p) for name, p in model.named_parameters()}
    own = takeover.own_trained
    banks = {name: m for name, m in model.named_modules() if isinstance(m, PrefixBank)}
    tensors = {f"{name}.prefix": _folded(bank) for name, bank in banks.items()}
    for name, parameter in model.named_parameters():
        in_bank = any(name.startswith(f"{bank}.") for bank in banks)
        if name in own or (is_method(name) and not in_bank):
            tensors[name] = whole(parameter)
    return tensors


def _folded(bank: PrefixBank) -> Tensor:
    if not is_sharded(bank):
        return bank().detach()
    parameters = {name: whole(parameter) for name, parameter in bank.named_parameters()}
    return torch.func.functional_call(bank, parameters, ()).detach()


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the injected method to ``folder`` (made if missing). Of a model that ``fully_shard``
    cut every process calls this, and the first writes.

    Raises ValueError when nothing is injected or it is merged, and OSError when the disk refuses; a
    checkpoint that was there before is then still whole.
    """
    takeover = takeover_of(model)
    if takeover.merged:
        raise ValueError("this model is merged into its base: unmerge it before save")
    tensors = {name: t.contiguous().cpu() for name, t in method_tensors(model).items()}
    if not writes(model):
        return
    about = {
        "format_version": FORMAT_VERSION,
        "config": dataclasses.asdict(takeover.config),
        "base": {
            "architecture": base_of(model).config.model_type,
            "name": base_of(model).config._name_or_path,
            "fingerprint": fingerprint(model),
        },
        "tensors": {name: list(t.shape) for name, t in tensors.items()},
    }
    writers = {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(about, indent=2) + "\n"),
    }
    write_files(Path(folder), writers, "the method")


def write_files(folder: Path, writers: dict[str, Callable[[Path], object]], what: str) -> None:
    """Write every file whole or none: beside their places first."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
        for name, part in parts.items():
            os.replace(part, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {what} to {folder}: {error}") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def save_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write what trains as it stands, to go on from: :func:`load_trained` reads it."""
    takeover_of(model)
    tensors = {
        name: whole(parameter).contiguous().cpu()
        for name, parameter in model.named_parameters() if parameter.requires_grad
    }  # fmt: skip
    if writes(model):
        write_files(Path(folder), {TRAINED_FILE: lambda to: save_file(tensors, to)}, "what trains")


def load_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Give an injected model what :func:`save_trained` wrote.

    Raises FileNotFoundError, or ValueError when the file is damaged or does not fit; the model is
    then as it was.
    """
    path = Path(folder) / TRAINED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to go on from in {folder}: {TRAINED_FILE} is missing")
    tensors = read_tensors(path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_fits(trained, tensors, folder)
    copy_tensors(model, tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def read_config(folder: str | os.PathLike) -> tuple[PeltConfig, dict]:
    """The config of a saved method, and everything else its JSON says.

    Raises FileNotFoundError when a file is missing, ValueError when it cannot be understood.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no saved method in {folder}: {name} is missing")
    try:
        about = json.loads((folder / CONFIG_FILE).read_text())
        version = about["format_version"]
        parts = {name: about[name] for name in ("config", "base", "tensors")}
        fingerprinted = {"fingerprint", "architecture", "name"} <= set(parts["base"])
        if not fingerprinted or not all(isinstance(part, dict) for part in parts.values()):
            raise TypeError("config, base or tensors is not what it should be")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a pelt_fast config: {error}") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this pelt_fast reads {FORMAT_VERSION}"
        )
    return PeltConfig.from_json(json.dumps(about["config"])), about


def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    slots: SlotMap | None = None,
    pack: bool = True,
) -> nn.Module:
    """Inject the method saved in ``folder`` into ``model``, with its weights; returns the model.
    ``slots`` and ``pack`` as for :func:`pelt_fast.inject`.

    Raises FileNotFoundError, or ValueError when the files are damaged, of another version, of
    another base, or do not fit the model; the model is then as it was.
    """
    config, about = read_config(folder)
    base = about["base"]
    if base["fingerprint"] != fingerprint(model):
        raise ValueError(
            f"the method in {folder} belongs to another base: it was saved from"
            f" {base['architecture']!r} ({base['name'] or 'no name'}), whose parameters differ in"
            f" name or shape from this {type(model).__name__}'s"
        )
    tensors = read_tensors(Path(folder) / WEIGHTS_FILE)
    if {name: list(t.shape) for name, t in tensors.items()} != about["tensors"]:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} does not hold what {CONFIG_FILE} lists")
    _check_sizes(config, tensors, folder)
    if config.is_full:
        check_fits(dict(model.named_parameters()), tensors, folder)
        inject(model, config)
        copy_tensors(model, tensors)
        return model
    inject(model, config, slots=slots, pack=pack)
    try:
        fold_banks(model, tensors)
        expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check_fits(expected, tensors, folder)
    except BaseException:
        eject(model)
        raise
    copy_tensors(model, tensors)
    return model


def _check_sizes(config: PeltConfig, tensors: dict[str, Tensor], folder) -> None:
    """A size is a dim of some tensor that came with it: no other is allocated."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    for modification in config.modifications:
        if modification.form not in ("full", "bias") and modification.size not in sizes:
            raise ValueError(
                f"{folder}: {CONFIG_FILE} asks for a {modification.form} of size"
                f" {modification.size}, {WEIGHTS_FILE} holds none"
            )


def fold_banks(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fold the prefixes that ``tensors`` holds folded."""
    for name, module in model.named_modules():
        if isinstance(module, PrefixBank) and f"{name}.prefix" in tensors:
            module.fold(tensors[f"{name}.prefix"])


def check_fits(expected: dict[str, Tensor], tensors: dict[str, Tensor], folder) -> None:
    """ValueError unless the names and shapes are those expected."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"the method in {folder} does not fit this model: it lacks"
            f" {', '.join(sorted(missing)[:3]) or 'nothing'} and has no use for"
            f" {', '.join(sorted(unexpected)[:3]) or 'nothing'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(tensor.shape)},"
                f" the model wants {tuple(expected[name].shape)}"
            )


@torch.no_grad()
def copy_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write tensors into the parameters of their names, in place."""
    parameters = dict(resharded(model).named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(like(parameters[name], tensor))
