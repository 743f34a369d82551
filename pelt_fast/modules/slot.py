"""How a site refers to the frozen modules it modifies, without owning them."""

import torch
from torch import Tensor, nn

LORA = "pelt_lora"  # the child a LoRA site is registered as, on the linear it modifies


class Slot:
    """A frozen module, hidden from ``nn.Module`` registration: its names stay its own."""

    def __init__(self, module: nn.Module):
        self.module = module

    @property
    def is_plain(self) -> bool:
        """Whether this is an ordinary frozen ``nn.Linear`` that nothing else modifies."""
        module = self.module
        frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
        return type(module) is nn.Linear and LORA not in module._modules and frozen

    def __call__(self, x: Tensor) -> Tensor:
        """The module's own forward, with the LoRA it may carry, past any takeover."""
        lora = self.module._modules.get(LORA)
        return type(self.module).forward(self.module, x) if lora is None else lora(x)


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
