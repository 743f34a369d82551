"""What the readers of other libraries' checkpoints share: files, and tensors put into a model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.injection.inject import eject, inject
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.names import is_method

from .files import read_tensors
from .method_tensors import check_fits, copy_tensors, fold_banks


def read_json(path: Path) -> dict:
    """The object in a JSON file; FileNotFoundError, or ValueError when it is no object."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {path.parent}: {path.name} is missing")
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return value


def read_weights(folder: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of the first of these files that exists; no code in it is executed."""
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".safetensors":
            return read_tensors(path)
        try:
            value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle may raise any error
            raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from None
        if not isinstance(value, dict) or not all(isinstance(t, Tensor) for t in value.values()):
            raise ValueError(f"{path} holds no tensors by name")
        return value
    raise FileNotFoundError(f"no adapter in {folder}: {' or '.join(names)} is missing")


def inject_with_tensors(
    model: nn.Module,
    config: PeltConfig,
    tensors_of: Callable[[], dict[str, Tensor]],
    source: Path,
) -> nn.Module:
    """Inject ``config``, and write the tensors that ``tensors_of`` then returns under our names. A
    task head that is not among them stays the model's own. Raises ValueError where a tensor is
    missing or does not fit; the model is then unchanged."""
    inject(model, config)
    try:
        tensors = tensors_of()
        fold_banks(model, tensors)
        trained = injection_of(model).own_trained & tensors.keys()
        expected = {n: p for n, p in model.named_parameters() if is_method(n) or n in trained}
        check_fits(expected, tensors, source)
        copy_tensors(model, tensors)
    except BaseException:
        eject(model)
        raise
    return model
