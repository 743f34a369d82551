"""A warning for layers by name that the first forward never calls: a LoRA there would do nothing.

A layout says which layers a model calls, a name does not. The owner of a layer may read its weight
itself.
"""

import logging

import torch
from torch import nn

from .record import Injection

logger = logging.getLogger("pelt_fast")
_SHOWN = 4  # names in the warning


class FirstForward:
    """Hooks of one forward of a model: each site says that it runs, and afterwards the hooks are
    removed."""

    def __init__(self, names: dict[nn.Module, str]):
        self.names = names
        self.handles: list = []

    def site_ran(self, site: nn.Module, *_) -> None:
        """After a site."""
        if not torch.compiler.is_compiling():
            self.names.pop(site, None)

    def model_ran(self, model: nn.Module, args, outputs) -> None:
        """After the model."""
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        if self.names:
            names = list(self.names.values())
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            logger.warning(
                "%d of the layers by name did not run in the first forward: %s. A LoRA there does"
                " nothing where the owner of the layer reads its weight without calling it",
                len(names), shown,
            )  # fmt: skip
            self.names.clear()


def warn_of_what_never_runs(
    model: nn.Module, names: dict[nn.Module, str], injection: Injection
) -> None:
    """Warn after the first forward of ``model`` if it did not call one of the sites."""
    first = FirstForward(names)
    first.handles = [site.register_forward_hook(first.site_ran) for site in names]
    first.handles.append(model.register_forward_hook(first.model_ran))
    for handle in first.handles:
        injection.changes.hook(handle)
