"""How a site refers to the frozen modules it modifies, without owning them."""

import functools
from collections.abc import Callable, Sequence
from types import MethodType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pelt_fast.ops.common.dispatch import DTYPES

from .decision import HOOKS, Basis
from .hooked import forward_attribute_of, holder_of, is_away, run
from .projection_view import LORA, holds_numbers, host_of, is_readable

# the forwards that compute x Wᵀ + b alone, as their classes define them; not those patched later
_LINEAR = (nn.Linear.forward, Conv1D.forward)
QUANTISED = "its weight is quantised"
OWN = "pelt_own"  # the child of a module that holds the parameters that several methods have there


def foreign_forward(module: nn.Module) -> Callable | None:
    """The forward that another library (Liger) set on this module, or None. Not foreign are the
    forwards of pelt_fast (a site's call, :func:`passthrough`) and accelerate's hook, which runs
    the module's own forward."""
    module = holder_of(module)
    outermost = module.__dict__.get(forward_attribute_of(module))
    if outermost is None:
        return None
    # dynamo of torch 2.11 gives getattr's default for what belongs to a method
    if isinstance(outermost, MethodType) and outermost.__func__ is type(module).forward:
        return None
    found = outermost
    for _ in range(64):  # a declared wrapper (``functools.wraps``) of our forward runs our forward
        if found is passthrough:
            return None
        owner = found.__self__ if isinstance(found, MethodType) else found
        if _is_ours(type(owner)):
            below = getattr(owner, "frozen", None)
            return None if below is None else below.foreign
        found = getattr(found, "__wrapped__", None)
        if found is None:
            break
    return outermost


@torch.compiler.assume_constant_result
def _is_ours(kind: type) -> bool:
    """Whether a class is of pelt_fast. dynamo of torch 2.11 reads the module of few classes."""
    return kind.__module__.startswith("pelt_fast.")


def is_repatched(module: nn.Module, forward: Callable) -> bool:
    """Whether the class of ``module`` runs another forward than ``forward``, which it ran before.
    A derived class (FSDP2) has the same forward, under one more of the wrappers that transformers
    puts on each class of layers. Any other wrapper counts as another forward."""
    found = type(module).forward
    again = getattr(found, "__wrapped__", None) is forward
    rewrapped = again and found.__globals__["__name__"] == "transformers.modeling_layers"
    return found is not forward and not rewrapped


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks: they run only when the module is called."""
    return any(getattr(module, name) for name in HOOKS)


def described(function) -> str:
    """The name of a function or callable for a message."""
    return getattr(function, "__qualname__", type(function).__name__)


def is_beside(weight: Tensor, trained: Sequence[Tensor]) -> bool:
    """Whether the ops take ``trained`` tensors with a frozen ``weight`` without conversion: same
    device, a dtype at least as wide."""
    return weight.dtype in DTYPES and all(
        tensor.device == weight.device
        and tensor.dtype in DTYPES
        and tensor.dtype.itemsize >= weight.dtype.itemsize
        for tensor in trained
    )


class FrozenModule:
    """A frozen module, hidden from ``nn.Module`` registration, so that its names do not change."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.foreign = foreign_forward(module)

    @property
    def is_plain(self) -> bool:
        """Whether this is an ordinary frozen ``nn.Linear``, or a part of one, that nothing else
        modifies. An op may then do its work without calling it."""
        holder = self._holder
        if type(holder) not in (nn.Linear, Conv1D) or is_hooked(holder):
            return False
        if any(p is not None and p.requires_grad for p in holder._parameters.values()):
            return False
        return LORA not in host_of(self.module)._modules and self.why_not_read() is None

    @property
    def is_quantised_alone(self) -> bool:
        """Whether this is a quantised layer that nothing else modifies: its own forward, called
        alone, is all that the model computes there."""
        if self.foreign is not None or foreign_forward(self.module) is not None:
            return False
        return not is_hooked(self._holder) and self.why_not_read() == QUANTISED

    @property
    def _holder(self) -> nn.Module:
        return holder_of(self.module)

    def why_not_read(self) -> str | None:
        """Why an op must not read a linear layer's weight instead of calling the layer, or None.

        All sites have one rule. An op reads the weight if the layer's forward is ``nn.Linear``'s or
        Conv1D's own and the weight is a matrix of numbers. Any other layer is called, and the
        update is added to its output.
        """
        if not holds_numbers(self._holder):
            return QUANTISED
        if is_away(self._holder):
            return "its weight is offloaded"
        if OWN in self._holder._modules:
            return "several methods have their own biases there"
        foreign = self.foreign or foreign_forward(self.module)
        if foreign is not None:
            return f"the layer's forward was replaced by another library ({described(foreign)})"
        if type(self._holder).forward not in _LINEAR:
            return f"the layer has a forward of its own ({type(self._holder).__name__})"
        return None if is_readable(self.module) else "its weight has another shape than the layer"

    def rests_on(self, basis: Basis) -> None:
        """Record in ``basis`` what :attr:`is_plain` and :meth:`why_not_read` read."""
        basis.linear(self._holder)
        basis.value(host_of(self.module)._modules, LORA)

    def held_weight(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, if they stay the same tensors until the basis changes. None for a view,
        a transposed matrix or a parametrized weight: each access makes a new tensor."""
        holder = self._holder
        if holder is not self.module or "weight" not in holder._parameters:
            return None
        return holder._parameters["weight"], holder._parameters.get("bias")

    def __call__(self, *args, **kwargs):
        """The module's own forward, with the LoRA on it if any, without our other changes."""
        lora = host_of(self.module)._modules.get(LORA)
        return self.bare(*args, **kwargs) if lora is None else lora(*args, **kwargs)

    def bare(self, *args, **kwargs):
        """The module's own forward alone, inside the hook that loads its weights."""
        module = host_of(self.module)
        # a partial: dynamo of torch 2.11 traces no __get__, that of 2.13 no call of MethodType
        forward = self.foreign or functools.partial(type(module).forward, module)
        own = module._modules.get(OWN)
        if own is None:
            return run(self._holder, forward, args, kwargs)
        return own.run(module, forward, args, kwargs)


class Foldable(nn.Module):
    """A site that may be folded into the frozen weights (``models.merge``)."""

    merged = False

    def is_folded(self) -> bool:
        """Whether the frozen weights hold the update. RuntimeError while such a model trains."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("this model is merged: its method cannot train; unmerge it first")
        return self.merged


def passthrough(x: Tensor) -> Tensor:
    """Return ``x``: the forward of a module whose work a site does."""
    return x
