"""How a site refers to the frozen modules it modifies, without owning them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .part import LORA, Part, host_of, is_readable


def foreign_forward(module: nn.Module) -> Callable | None:
    """The forward that somebody else (Liger, accelerate's hooks) put on this very module, or None.
    What pelt_fast puts there is a site's own forward or :func:`passthrough`."""
    module = module.owner if isinstance(module, Part) else module
    found = module.__dict__.get("forward")
    owner = type(getattr(found, "__self__", found))
    ours = found is passthrough or owner.__module__.startswith("pelt_fast.")
    return None if found is None or ours else found


class Slot:
    """A frozen module, hidden from ``nn.Module`` registration: its names stay its own."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.foreign = foreign_forward(module)

    @property
    def is_plain(self) -> bool:
        """Whether this is an ordinary frozen ``nn.Linear``, or a part of one, that nothing else
        modifies."""
        module = self.module
        holder = module.owner if isinstance(module, Part) else module
        frozen = not any(p.requires_grad for p in holder.parameters(recurse=False))
        own = LORA not in host_of(module)._modules and self.foreign is None
        return type(module) in (nn.Linear, Part) and own and frozen and is_readable(module)

    def __call__(self, *args, **kwargs):
        """The module's own forward, with the LoRA it may carry, past any takeover of ours."""
        lora = host_of(self.module)._modules.get(LORA)
        return self.bare(*args, **kwargs) if lora is None else lora(*args, **kwargs)

    def bare(self, *args, **kwargs):
        """The module's own forward alone."""
        if self.foreign is not None:
            return self.foreign(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class Foldable(nn.Module):
    """A site that may be folded into the frozen weights (``models.merge``)."""

    merged = False

    def is_folded(self) -> bool:
        """Whether the frozen weights do the work; RuntimeError when that would train nothing."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("this model is merged: its method cannot train; unmerge it first")
        return self.merged


def passthrough(x: Tensor) -> Tensor:
    """What a module runs whose work was taken over."""
    return x
