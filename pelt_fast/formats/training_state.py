"""The training state: every parameter that trains, so that training can be resumed.

:func:`pelt_fast.save` writes the finished method: a prefix without its MLP. Here the MLP is kept.
"""

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from pelt_fast.injection.handles import carrier_of
from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules.hooked import at_hand, holders

from .files import read_tensors, write_files
from .method_tensors import check_fits, copy_tensors
from .renamed_tensors import renamed
from .sharded import whole, writes

TRAINED_FILE = "pelt_training.safetensors"


def save_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write every parameter that trains; :func:`load_trained` reads them."""
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

    Raises FileNotFoundError, or ValueError when the file is damaged or does not fit. The model is
    then unchanged.
    """
    model = carrier_of(model)
    path = Path(folder) / TRAINED_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no training state in {folder}: {TRAINED_FILE} is missing")
    tensors = renamed(read_tensors(path))
    trained = {name: p for name, p in parameters_of(model).items() if p.requires_grad}
    check_fits(trained, tensors, folder)
    copy_tensors(model, tensors)
