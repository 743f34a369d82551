"""How a site refers to the frozen modules it modifies, without owning them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelt_fast.ops.common.dispatch import DTYPES

from .decision import HOOKS, Basis
from .hooked import forward_attribute_of, holder_of, is_away, run
from .projection_view import LORA, holds_numbers, host_of, is_readable

# the forwards that are nothing but x Wᵀ + b, as they are written: one patched later is another
_LINEAR = (nn.Linear.forward, Conv1D.forward)
QUANTISED = "its weight is quantised"


def foreign_forward(module: nn.Module) -> Callable | None:
    """The forward that somebody else (Liger) put on this very module, or None. What pelt_fast puts
    there is a call of a site's or :func:`passthrough`, and a site knows what it found there;
    accelerate's hook runs the module's own."""
    module = holder_of(module)
    outermost = module.__dict__.get(forward_attribute_of(module))
    if outermost is None or getattr(outermost, "__func__", None) is type(module).forward:
        return None
    found = outermost
    for _ in range(64):  # what wraps ours, and says so (``functools.wraps``), runs ours
        if found is passthrough:
            return None
        owner = getattr(found, "__self__", found)
        if type(owner).__module__.startswith("pelt_fast."):
            below = getattr(owner, "frozen", None)
            return None if below is None else below.foreign
        found = getattr(found, "__wrapped__", None)
        if found is None:
            break
    return outermost


def is_repatched(module: nn.Module, forward: Callable) -> bool:
    """Whether the class of ``module`` runs another forward than ``forward``, which it ran before.
    A class that somebody derives for it (FSDP2) has the same one, under one more of the wrappers
    that transformers gives each class of layers; anybody else's wrapper may do anything."""
    found = type(module).forward
    again = getattr(found, "__wrapped__", None) is forward
    rewrapped = again and found.__globals__["__name__"] == "transformers.modeling_layers"
    return found is not forward and not rewrapped


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody's hooks hang on a module: they run where it is called, and nowhere else."""
    return any(getattr(module, name) for name in HOOKS)


def described(function) -> str:
    """A function or callable in a message."""
    return getattr(function, "__qualname__", type(function).__name__)


def is_beside(weight: Tensor, trained: Sequence[Tensor]) -> bool:
    """Whether the ops take ``trained`` tensors beside a frozen ``weight`` as they are: of its
    device, no narrower than it."""
    return weight.dtype in DTYPES and all(
        tensor.device == weight.device
        and tensor.dtype in DTYPES
        and tensor.dtype.itemsize >= weight.dtype.itemsize
        for tensor in trained
    )


class FrozenModule:
    """A frozen module, hidden from ``nn.Module`` registration: its names stay its own."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.foreign = foreign_forward(module)

    @property
    def is_plain(self) -> bool:
        """Whether this is an ordinary frozen ``nn.Linear``, or a part of one, that nothing else
        modifies: an op may do its work without calling it."""
        holder = self._holder
        if type(holder) not in (nn.Linear, Conv1D) or is_hooked(holder):
            return False
        if any(p is not None and p.requires_grad for p in holder._parameters.values()):
            return False
        return LORA not in host_of(self.module)._modules and self.why_not_read() is None

    @property
    def _holder(self) -> nn.Module:
        return holder_of(self.module)

    def why_not_read(self) -> str | None:
        """Why an op must not read the weight of a linear layer where the layer would run, or None.

        The rule of all sites: the forward that runs is ``nn.Linear``'s or Conv1D's own, and the
        weight is a matrix of numbers. Anything else runs itself, and the update is added to it.
        """
        if not holds_numbers(self._holder):
            return QUANTISED
        if is_away(self._holder):
            return "its weight is offloaded"
        foreign = self.foreign or foreign_forward(self.module)
        if foreign is not None:
            return f"the layer's forward was replaced by another library ({described(foreign)})"
        if type(self._holder).forward not in _LINEAR:
            return f"the layer has a forward of its own ({type(self._holder).__name__})"
        return None if is_readable(self.module) else "its weight has another shape than the layer"

    def rests_on(self, basis: Basis) -> None:
        """Tell ``basis`` what :attr:`is_plain` and :meth:`why_not_read` look at."""
        basis.linear(self._holder)
        basis.value(host_of(self.module)._modules, LORA)

    def held_weight(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias that stay the same tensors as long as the basis holds; None for a view,
        a transposed matrix or a parametrized weight, which are made at each look."""
        holder = self._holder
        if holder is not self.module or "weight" not in holder._parameters:
            return None
        return holder._parameters["weight"], holder._parameters.get("bias")

    def __call__(self, *args, **kwargs):
        """The module's own forward, with the LoRA it may carry, past any injection of ours."""
        lora = host_of(self.module)._modules.get(LORA)
        return self.bare(*args, **kwargs) if lora is None else lora(*args, **kwargs)

    def bare(self, *args, **kwargs):
        """The module's own forward alone, under the hook that brings its weights."""
        module = host_of(self.module)
        own = self.foreign or type(module).forward.__get__(module)
        return run(self._holder, own, args, kwargs)


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
