"""save and load: the method's tensors and a JSON, never the base.

``pelt_config.json`` holds the format version, the config and what base it belongs to;
``pelt_model.safetensors`` the method's tensors and the task head's. A prefix is stored as its keys
and values: its reparameterisation ends with training. Both files are written beside their final
names and moved there when whole; the JSON holds a digest of the tensors, so that halves of two
saves are told. What FSDP2 sharded is gathered: every process calls, the first
writes.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.injection.handles import carrier_of, refuse_second
from pelt_fast.injection.inject import eject, head_names, inject
from pelt_fast.injection.record import Injection, injection_of
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.lookup import base_of
from pelt_fast.layouts.names import is_method, modules_of, parameters_of, unwrapped
from pelt_fast.modules import PrefixBank
from pelt_fast.modules.hooked import at_hand, holders

from .digest import digest
from .fingerprint import fingerprint, fingerprints
from .sharded import is_sharded, like, resharded, whole, writes

FORMAT_VERSION = 1
CONFIG_FILE = "pelt_config.json"
WEIGHTS_FILE = "pelt_model.safetensors"
TRAINED_FILE = "pelt_training.safetensors"
_RENAMED = {"norm_weight": "norm.weight", "norm_bias": "norm.bias"}  # of an adapter's LayerNorm

logger = logging.getLogger("pelt_fast")


def method_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`save` stores, by name: the method folded, and the trained task head."""
    model = carrier_of(model)
    injection = injection_of(model)
    names = {name for name, _ in model.named_parameters()}
    if not injection.config.is_full:
        names = {name for name in names if is_method(name) or name in injection.own_trained}
    with at_hand(holders(model, names)):
        return _method_tensors(model, injection)


def _method_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    if injection.config.is_full:
        return {name: whole(p) for name, p in parameters_of(model).items()}
    own = injection.own_trained
    banks = {name: m for name, m in modules_of(model).items() if isinstance(m, PrefixBank)}
    tensors = {f"{name}.prefix": _folded(bank) for name, bank in banks.items()}
    for name, parameter in parameters_of(model).items():
        in_bank = any(name.startswith(f"{bank}.") for bank in banks)
        if name in own or (is_method(name) and not in_bank):
            tensors[name] = whole(parameter)
    return tensors


def _folded(bank: PrefixBank) -> Tensor:
    if not is_sharded(bank):
        return bank().detach()
    parameters = {name: whole(parameter) for name, parameter in bank.named_parameters()}
    return torch.func.functional_call(bank, parameters, ()).detach()


def also_trained(model: nn.Module) -> list[str]:
    """Names of the base's parameters that train though they are no part of the method: what a user
    unfroze after inject."""
    injection = injection_of(model)
    if injection.config.is_full:
        return []
    own = injection.own_trained
    return [name for name, parameter in parameters_of(carrier_of(model)).items()
            if parameter.requires_grad and name not in own and not is_method(name)]  # fmt: skip


def save(
    model: nn.Module, folder: str | os.PathLike, *, include_trained: bool | None = None
) -> None:
    """Write the injected method to ``folder`` (made if missing). Of a model that ``fully_shard``
    cut every process calls this, and the first writes.

    ``include_trained`` decides about what was unfrozen after inject and is no part of the method
    (embeddings of new tokens, a norm): True writes it, too, and :func:`load` gives it back and lets
    it train; False leaves it out; None does so with a warning that names it. Raises ValueError when
    nothing is injected or it is merged, and OSError when the disk refuses; a checkpoint that was
    there before is then still whole.
    """
    model = carrier_of(model)
    injection = injection_of(model)
    if injection.merged:
        raise ValueError("this model is merged into its base: unmerge it before save")
    tensors = method_tensors(model)
    also = also_trained(model)
    if also and include_trained is None:
        logger.warning(
            "save leaves out what trains and is no part of the method: %s. include_trained=True"
            " writes it, too; include_trained=False leaves it out without this warning",
            ", ".join(also),
        )
    also = also if include_trained else []
    tensors |= {name: whole(parameters_of(model)[name]) for name in also}
    tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
    if not writes(model):
        return
    about = {
        "format_version": FORMAT_VERSION,
        "config": injection.config.as_dict(),
        "base": {
            "architecture": base_of(model).config.model_type,
            "name": base_of(model).config._name_or_path,
            "fingerprint": fingerprint(model),
        },
        "tensors": {name: list(t.shape) for name, t in tensors.items()},
        "also_trained": also,
        "digest": digest(tensors),
    }
    writers = {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(about, indent=2) + "\n"),
    }
    write_files(Path(folder), writers, "the method")


def write_files(
    folder: Path,
    writers: dict[str, Callable[[Path], object]],
    what: str,
    key: str | None = None,
) -> None:
    """Write every file whole or none: beside their places first.

    ``key`` is the file without which the others are no checkpoint, of a format that has no digest:
    it goes before the first is moved and comes last, so that a cut leaves none and no mixture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in writers}
    try:
        for name, write in writers.items():
            write(parts[name])
        if key is not None:
            (folder / key).unlink(missing_ok=True)
        for name, part in sorted(parts.items(), key=lambda item: item[0] == key):
            os.replace(part, folder / name)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not save {what} to {folder}: {error}") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def save_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write what trains as it stands, to go on from: :func:`load_trained` reads it."""
    model = carrier_of(model)
    trained = {name for name, p in parameters_of(model).items() if p.requires_grad}
    with at_hand(holders(model, trained)):
        tensors = {
            name: whole(parameter).contiguous().cpu()
            for name, parameter in parameters_of(model).items() if name in trained
        }  # fmt: skip
    if writes(model):
        write_files(Path(folder), {TRAINED_FILE: lambda to: save_file(tensors, to)}, "what trains")


def load_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Give an injected model what :func:`save_trained` wrote.

    Raises FileNotFoundError, or ValueError when the file is damaged or does not fit; the model is
    then as it was.
    """
    model = carrier_of(model)
    path = Path(folder) / TRAINED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"nothing to go on from in {folder}: {TRAINED_FILE} is missing")
    tensors = _renamed(read_tensors(path))
    trained = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
    check_fits(trained, tensors, folder)
    copy_tensors(model, tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError when it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by today's names."""
    found = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if is_method(name) and last in _RENAMED:
            name = f"{path}.{_RENAMED[last]}"
        found[name] = tensor
    return found


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


@renamed_keyword("slots", "layout")
def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    layout: Layout | None = None,
    pack: bool = True,
    head: bool = True,
) -> nn.Module:
    """Inject the method saved in ``folder`` into ``model``, with its weights; returns the model.
    ``layout`` and ``pack`` as for :func:`pelt_fast.inject`. ``head=False`` leaves the saved task
    head out: the model's own stays, of however many labels, and trains.

    What was saved beside the method (``include_trained``) is given back and trains; eject returns
    the values that were there before. The base may be quantised where the one the method was
    trained on was not, and the other way round. Raises FileNotFoundError, or ValueError when the
    files are damaged, halves of two saves, of another version, of another base, or do not fit the
    model; the model is then as it was.
    """
    handle, model = model, unwrapped(model)
    config, about = read_config(folder)
    base = about["base"]
    refuse_second(model)
    if base["fingerprint"] not in fingerprints(model):
        raise ValueError(
            f"the method in {folder} belongs to another base: it was saved from"
            f" {base['architecture']!r} ({base['name'] or 'no name'}), whose parameters differ in"
            f" name or shape from this {type(model).__name__}'s"
        )
    tensors = _read_saved(Path(folder), about)
    _check_sizes(config, tensors, folder)
    if config.is_full:
        expected = parameters_of(model)
        if not head:
            of_base = expected.keys() - set(head_names(model))
            expected, tensors = (
                {name: value for name, value in found.items() if name in of_base}
                for found in (expected, tensors)
            )
        check_fits(expected, tensors, folder)
        inject(model, config)
        copy_tensors(model, tensors)
        return handle
    inject(model, config, layout=layout, pack=pack)
    try:
        fold_banks(model, tensors)
        _unfreeze(model, about.get("also_trained", []), folder)
        expected = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
        if not head:
            expected, tensors = _headless(model, expected, tensors, about)
        check_fits(expected, tensors, folder)
    except BaseException:
        eject(model)
        raise
    copy_tensors(model, tensors)
    return handle


def _read_saved(folder: Path, about: dict) -> dict[str, Tensor]:
    """The tensors that belong to a JSON; ValueError when they do not."""
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if "digest" in about and about["digest"] != digest(tensors):
        raise ValueError(
            f"{folder} holds halves of two saves: {WEIGHTS_FILE} is not the one that {CONFIG_FILE}"
            " was written with. A save was cut short, or a file changed since: save again"
        )
    if {name: list(t.shape) for name, t in tensors.items()} != about["tensors"]:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} does not hold what {CONFIG_FILE} lists")
    return _renamed(tensors)


def _unfreeze(model: nn.Module, names: list[str], folder) -> None:
    """Let what was saved beside the method train; eject gives the values of before back."""
    parameters, injection = parameters_of(model), injection_of(model)
    for name in names:
        if name not in parameters:
            raise ValueError(f"{folder}: {type(model).__name__} has no {name} to give back")
        injection.before.trained[name] = parameters[name].detach().clone()
        parameters[name].requires_grad_(True)


def _headless(model: nn.Module, expected: dict, tensors: dict, about: dict) -> tuple[dict, dict]:
    """What is expected and what is there, but for task heads."""
    injection = injection_of(model)
    kept = {*injection.biases, *about.get("also_trained", [])}
    return tuple(
        {name: value for name, value in found.items() if is_method(name) or name in kept}
        for found in (expected, tensors)
    )


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
    for name, module in modules_of(model).items():
        if isinstance(module, PrefixBank) and f"{name}.prefix" in tensors:
            module.fold(tensors[f"{name}.prefix"])


def check_fits(expected: dict[str, Tensor], tensors: dict[str, Tensor], folder) -> None:
    """ValueError unless the names and shapes are those expected."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"the method in {folder} does not fit this model: it lacks"
            f" {', '.join(sorted(missing)[:3]) or 'nothing'} and has no use for"
            f" {', '.join(sorted(unexpected)[:3]) or 'nothing'}{_about_head(missing | unexpected)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(tensor.shape)},"
                f" the model wants {tuple(expected[name].shape)}{_about_head({name})}"
            )


def _about_head(names: set[str]) -> str:
    """What helps where what does not fit is no site's."""
    if any(is_method(name) for name in names):
        return ""
    return ". Is it another task head? load(..., head=False) leaves the saved one out"


@torch.no_grad()
def copy_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write tensors into the parameters of their names, in place."""
    resharded(model)
    with at_hand(holders(model, tensors), write=True):
        parameters = parameters_of(model)
        for name, tensor in tensors.items():
            parameters[name].copy_(like(parameters[name], tensor))
