"""Where a model of an architecture without a row keeps its layers, found without its weights."""

from collections.abc import Callable

import torch
from torch import nn

import pelt_fast
from pelt_fast.config import PeltConfig
from pelt_fast.config.named_modules import MODULES
from pelt_fast.injection.discovery.discover import discover
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.table import rows_of

from .estimate import free_memory
from .first_layers import first_layers, of_all_layers

MOST = 500_000_000  # parameters of a model that is built whole with random weights


class NotKnown(ValueError):
    """A layout that cannot be told without the weights of the model."""


def needs_discovery(model: nn.Module, method: PeltConfig) -> bool:
    """Whether a method needs a layout, and the table has no row of the model's architecture."""
    by_layout = any(m.target != MODULES for m in method.modifications)
    return by_layout and not method.is_full and not rows_of(model)


def found_layout(model: nn.Module, method: PeltConfig, made: Callable, config) -> Layout | None:
    """The layout of ``model``, which is on the meta device, as random weights show it; None where
    the method or the table needs none. ``made(config)`` builds the model.

    A model that is not large is tried whole, with the method; of a large one the first layers tell.
    Raises NotKnown where they do not, ValueError where no layout is found, or a try fails.
    """
    if not needs_discovery(model, method):
        return None
    if sum(parameter.numel() for parameter in model.parameters()) <= MOST:
        whole = _random(model, made, config)
        layout = _discovered(whole)
        pelt_fast.inject(whole, method)
        return layout
    try:
        few = _random(model, made, first_layers(model, config))
        layout = of_all_layers(_discovered(few), few, model)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise _not_known(model, f"its first layers cannot be built ({error})") from None
    if layout is None:
        raise _not_known(model, "its first layers do not tell of the others")
    return layout


def _discovered(model: nn.Module) -> Layout:
    try:
        return discover(model)
    except ValueError:
        raise ValueError(
            f"no layout was found for the architecture {model.config.model_type!r} (pelt-fast"
            " explain says why): a LoRA on modules by name needs none, as pelt-fast train --method"
            " lora --set targets=all-linear"
        ) from None


def _random(model: nn.Module, made: Callable, config) -> nn.Module:
    """The model of a config with random weights, in its dtype. Raises NotKnown where the config or
    the memory does not allow it."""
    try:
        with torch.device("meta"):
            needed = sum(p.numel() * p.element_size() for p in made(config).parameters())
    except Exception as error:  # a config may check its fields against each other
        raise _not_known(model, f"its first layers cannot be built ({error})") from None
    free = free_memory(torch.device("cpu"))
    if free is not None and 2 * needed > free:
        raise _not_known(model, f"{needed / 1e9:.1f} GB of random weights have no room here")
    return made(config)


def _not_known(model: nn.Module, why: str) -> NotKnown:
    return NotKnown(
        f"the table has no row of the architecture {model.config.model_type!r}, and its layout"
        f" cannot be told without the weights: {' '.join(why.split())}. pelt-fast train finds it"
    )
