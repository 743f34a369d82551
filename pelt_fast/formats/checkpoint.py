"""save and load: the method's tensors and a JSON file, never the base.

``pelt_config.json`` holds the format version, the config, and which base the method belongs to.
``pelt_model.safetensors`` holds the method's tensors and the task head's. A prefix is stored as its
keys and values, without its MLP. Both files are written under other names and then moved. The JSON
holds a digest of the tensors, so that a mixture of two saves is noticed. Parameters that FSDP2 has
sharded are gathered: every process must call, and the first one writes.
"""

import json
import logging
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.config.word_values import flag
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.injection.handles import carrier_of, refuse_second
from pelt_fast.injection.inject import eject, inject
from pelt_fast.injection.inject_together import TogetherInjection
from pelt_fast.injection.record import Injection, injection_of
from pelt_fast.injection.trained_names import head_names
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import is_method, parameters_of, unwrapped

from .digest import digest
from .files import read_tensors, write_files
from .fingerprint import fingerprint, fingerprints, identity
from .method_tensors import check_fits, copy_tensors, fold_banks, method_tensors
from .renamed_tensors import renamed
from .sharded import whole, writes

FORMAT_VERSION = 1
CONFIG_FILE = "pelt_config.json"
WEIGHTS_FILE = "pelt_model.safetensors"

logger = logging.getLogger("pelt_fast")


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    include_trained: bool | None = None,
    method: str | None = None,
) -> None:
    """Write the method of a model to a folder. The base is not written.

    For a model that ``fully_shard`` has sharded, every process calls this, and the first one
    writes.

    Args:
        model: a model with a method, or a wrapper of one.
        folder: made when it is missing.
        include_trained: what to do with parameters that were unfrozen after inject and are no part
            of the method (embeddings of new tokens, a norm). True writes them, and :func:`load`
            restores them and lets them train. False leaves them out. None leaves them out, with a
            warning that names them.
        method: of methods that are in the model together (:func:`pelt_fast.inject_named`), the one
            to write; None is the active one.

    Raises:
        ValueError: nothing is injected, the method is merged, or no method has that name.
        OSError: the disk refuses. A checkpoint that was in the folder is then still whole.

    Saved:
        ``pelt_config.json`` and ``pelt_model.safetensors``. A prefix is (L, 2, H, P, D): its keys
        and values, without its MLP. Tensors keep their dtypes.

    Example:
        pelt_fast.save(model, "xsum-mam")
    """
    model = carrier_of(model)
    injection = injection_of(model)
    if injection.merged:
        raise ValueError("this model is merged into its base: unmerge it before save")
    method = _named(injection, method)
    config = injection.config if method is None else injection.methods[method]
    tensors = method_tensors(model, method)
    unfrozen = _unfrozen_to_save(model, injection, include_trained)
    tensors |= {name: whole(parameters_of(model)[name]) for name in unfrozen}
    tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
    if not writes(model):
        return
    description = _description(model, config, tensors, unfrozen)
    writers = {
        WEIGHTS_FILE: lambda to: save_file(tensors, to, metadata={"format": "pt"}),
        CONFIG_FILE: lambda to: to.write_text(json.dumps(description, indent=2) + "\n"),
    }
    write_files(Path(folder), writers, "the method")


def _unfrozen_to_save(
    model: nn.Module, injection: Injection, include_trained: bool | None
) -> list[str]:
    """Names of the base's parameters that a user unfroze after inject, where they are saved."""
    if injection.config.is_full:
        return []
    unfrozen = [
        name for name, parameter in parameters_of(model).items()
        if parameter.requires_grad and name not in injection.own_trained and not is_method(name)
    ]  # fmt: skip
    if unfrozen and include_trained is None:
        logger.warning(
            "save leaves out what trains and is no part of the method: %s. include_trained=True"
            " writes it, too; include_trained=False leaves it out without this warning",
            ", ".join(unfrozen),
        )
    return unfrozen if include_trained else []


def _named(injection: Injection, method: str | None) -> str | None:
    """The method to write, where several are in the model together."""
    if isinstance(injection, TogetherInjection):
        method = injection.active if method is None else injection.known(method)
        if method is None:
            raise ValueError("the base alone is active: save(model, folder, method=name) names one")
        return method
    if method is not None:
        raise ValueError(
            f"method={method!r}: this model has {injection.config.name!r} alone, or one of several"
            " at a time: set_active chooses it"
        )
    return None


def _description(
    model: nn.Module, config: PeltConfig, tensors: dict[str, Tensor], unfrozen: list[str]
) -> dict:
    """The content of the JSON file."""
    architecture, name = identity(model)
    return {
        "format_version": FORMAT_VERSION,
        "config": config.as_dict(),
        "base": {
            "architecture": architecture,
            "name": name,
            "fingerprint": fingerprint(model),
            **_class_and_labels(model),
        },
        "tensors": {name: list(t.shape) for name, t in tensors.items()},
        "also_trained": unfrozen,
        "digest": digest(tensors),
    }


def _class_and_labels(model: nn.Module) -> dict:
    """The name of transformers' class of a model (FSDP2 derives one of its own), and a
    classification's labels: what a fresh base is made with."""
    classes = type(model).__mro__
    own = (kind for kind in classes if kind.__module__.startswith("transformers."))
    name = next(own, classes[0]).__name__
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if "Classification" not in name or not labels:
        return {"class": name}
    return {"class": name, "labels": list(labels.values())}


def read_config(folder: str | os.PathLike) -> tuple[PeltConfig, dict]:
    """The config of a saved method, and the whole content of its JSON file.

    Raises FileNotFoundError when a file is missing, ValueError when it cannot be understood.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no saved method in {folder}: {name} is missing")
    try:
        description = json.loads((folder / CONFIG_FILE).read_text())
        version = description["format_version"]
        parts = {name: description[name] for name in ("config", "base", "tensors")}
        fingerprinted = {"fingerprint", "architecture", "name"} <= set(parts["base"])
        if not fingerprinted or not all(isinstance(part, dict) for part in parts.values()):
            raise TypeError("config, base or tensors is not what it should be")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a pelt_fast config: {error}") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this pelt_fast reads {FORMAT_VERSION}"
        )
    return PeltConfig.from_json(json.dumps(description["config"])), description


@renamed_keyword("slots", "layout")
def load(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    layout: Layout | None = None,
    pack: bool = True,
    head: bool = True,
) -> nn.Module:
    """Inject the method that :func:`save` wrote, with its weights.

    The base may be quantised where the one that the method was trained on was not, and the other
    way round. Parameters that were saved beside the method (``include_trained``) are restored and
    train; eject gives them the values from before.

    Args:
        model: a model of the base that the method belongs to, without a method.
        folder: what :func:`save` wrote.
        layout: as for :func:`pelt_fast.inject`.
        pack: as for :func:`pelt_fast.inject`.
        head: False leaves the saved task head out. The model's own head, with any number of
            labels, then stays and trains.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: ``pack`` or ``head`` is not true or false.
        ValueError: the files are damaged, a mixture of two saves, of another version or of another
            base, or they do not fit the model. The model is unchanged.

    Example:
        model = BartForConditionalGeneration.from_pretrained("facebook/bart-large")
        pelt_fast.load(model, "xsum-mam")
    """
    flag("head", head)
    handle, model = model, unwrapped(model)
    config, description = read_config(folder)
    refuse_second(model)
    _check_base(model, description["base"], folder)
    tensors = _read_saved(Path(folder), description)
    _check_sizes(config, tensors, folder)
    if config.is_full:
        _load_full(model, config, tensors, folder, head)
        return handle
    inject(model, config, layout=layout, pack=pack)
    try:
        fold_banks(model, tensors)
        _unfreeze(model, description.get("also_trained", []), folder)
        expected = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
        if not head:
            expected, tensors = _without_head(model, expected, tensors, description)
        check_fits(expected, tensors, folder)
    except BaseException:
        eject(model)
        raise
    copy_tensors(model, tensors)
    return handle


def read_method(
    model: nn.Module, folder: str | os.PathLike
) -> tuple[PeltConfig, dict[str, Tensor]]:
    """The config and the tensors of a saved method, checked against the base of ``model``."""
    config, description = read_config(folder)
    _check_base(model, description["base"], folder)
    tensors = _read_saved(Path(folder), description)
    _check_sizes(config, tensors, folder)
    return config, tensors


def _check_base(model: nn.Module, base: dict, folder) -> None:
    if base["fingerprint"] not in fingerprints(model):
        raise ValueError(
            f"the method in {folder} belongs to another base: it was saved from"
            f" {base['architecture']!r} ({base['name'] or 'no name'}), whose parameters differ in"
            f" name or shape from this {type(model).__name__}'s"
        )


def _load_full(model: nn.Module, config: PeltConfig, tensors: dict, folder, head: bool) -> None:
    """Full fine-tuning: the tensors are the whole model."""
    expected = parameters_of(model)
    if not head:
        of_base = expected.keys() - set(head_names(model))
        expected, tensors = (
            {name: value for name, value in named.items() if name in of_base}
            for named in (expected, tensors)
        )
    check_fits(expected, tensors, folder)
    inject(model, config)
    copy_tensors(model, tensors)


def _read_saved(folder: Path, description: dict) -> dict[str, Tensor]:
    """The tensors that a JSON file describes; ValueError when it describes others."""
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if "digest" in description and description["digest"] != digest(tensors):
        raise ValueError(
            f"{folder} holds halves of two saves: {WEIGHTS_FILE} is not the one that {CONFIG_FILE}"
            " was written with. A save was cut short, or a file changed since: save again"
        )
    if {name: list(t.shape) for name, t in tensors.items()} != description["tensors"]:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} does not hold what {CONFIG_FILE} lists")
    return renamed(tensors)


def _unfreeze(model: nn.Module, names: list[str], folder) -> None:
    """Let the base's parameters that were saved beside the method train. Eject restores them."""
    parameters, injection = parameters_of(model), injection_of(model)
    for name in names:
        if name not in parameters:
            raise ValueError(f"{folder}: {type(model).__name__} has no {name} to give back")
        injection.before.trained[name] = parameters[name].detach().clone()
        parameters[name].requires_grad_(True)


def _without_head(
    model: nn.Module, expected: dict, tensors: dict, description: dict
) -> tuple[dict, dict]:
    """The expected and the saved tensors without task heads."""
    kept = {*injection_of(model).biases, *description.get("also_trained", [])}
    return tuple(
        {name: value for name, value in named.items() if is_method(name) or name in kept}
        for named in (expected, tensors)
    )


def _check_sizes(config: PeltConfig, tensors: dict[str, Tensor], folder) -> None:
    """A size in the config must be a dimension of a tensor in the file. No other is allocated."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    for m in config.modifications:
        wanted = [] if m.form in ("full", "bias") else [m.size]
        if m.patterns and m.size <= max(sizes, default=0):
            wanted = []  # the patterns may be on every layer
        for size in (*wanted, *(size for _, size, _ in m.patterns)):
            if size not in sizes:
                raise ValueError(
                    f"{folder}: {CONFIG_FILE} asks for a {m.form} of size {size}, {WEIGHTS_FILE}"
                    " holds none"
                )
