"""What a site runs. The decision is kept until one of the facts behind it changes.

A site decides when a method is injected. It decides again only when one of these facts changes: a
projection was replaced, patched, hooked, quantised, cast or moved; the activation, the dropout or
the backend of the thread is another. :class:`Basis` records the facts, and :meth:`Basis.look`
compares them once in each forward, and once in a whole ``generate``. ``explain`` prints the
decision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.ops.common.backends import active

from .generation import generation

_PUBLIC = {name: getattr(functional, name) for name in functional.__all__}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_public(*names: str) -> bool:
    """Whether the public functions of these names are the package's own. If a user replaced one,
    the site calls the replacement."""
    return all(getattr(functional, name) is _PUBLIC[name] for name in names)


@dataclass(frozen=True)
class Decision:
    """What a site runs.

    Args:
        plan: its name: an op's plan (``dispatch.plan``), or how the site runs without an op.
        reason: why the site runs no faster plan; None if it runs the fastest.
        runs_op: whether the site's op runs on the frozen weights, not beside the frozen layer.
        given: the arguments of the op that the frozen module holds, checked for inputs of
            ``dtype``, ``device`` and ``width`` channels. None: the public function checks calls.
        dtype: see ``given``.
        device: see ``given``.
        width: see ``given``.
    """

    plan: str
    reason: str | None = None
    runs_op: bool = True
    given: Any = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    width: int = 0


class Basis:
    """The facts behind a decision, each with its value at that time."""

    def __init__(self):
        self.values: list[tuple[dict, str, Any]] = []  # entries of instance dicts
        self.filled: list[tuple[dict, bool]] = []  # tables of hooks: whether they hold any
        self.kinds: list[tuple[nn.Module, type, Callable]] = []  # a class and its forward
        self.tensors: list[tuple[Tensor, torch.dtype, torch.device, bool]] = []
        self.probabilities: list[tuple[Any, str, nn.Module]] = []  # object, attribute, mode's owner
        self.backend = active.name

    def value(self, table: dict, name: str) -> None:
        """Record an entry of ``table``, by identity; it may be missing."""
        self.values.append((table, name, table.get(name)))

    def functions(self, *names: str) -> None:
        """Record the public functions of these names (:func:`is_public`)."""
        for name in names:
            self.value(vars(functional), name)

    def attribute(self, owner: Any, name: str) -> None:
        """Record the value of ``owner.name``."""
        tables = (getattr(owner, kind, {}) for kind in ("_modules", "_parameters", "_buffers"))
        self.value(next((t for t in tables if name in t), owner.__dict__), name)

    def module(self, module: nn.Module, *attributes: str) -> None:
        """Record a module whose work an op does: its class and that class's forward, the forward
        set on the module itself, hooks, and ``attributes``."""
        self.kinds.append((module, type(module), type(module).forward))
        for name in ("forward", "_old_forward", "_hf_hook", *attributes):
            self.value(module.__dict__, name)
        self.tables(module, HOOKS)

    def tables(self, module: nn.Module, names: tuple[str, ...]) -> None:
        """Record whether the tables of hooks with these names hold any."""
        self.filled += [(t, bool(t)) for t in (getattr(module, name) for name in names)]

    def linear(self, holder: nn.Module) -> None:
        """Record a module that holds a frozen weight: as :meth:`module`, and its parameters."""
        self.module(holder)
        for name, parameter in holder._parameters.items():
            self.value(holder._parameters, name)
            if parameter is not None:
                self.tensor(parameter)

    def tensor(self, tensor: Tensor) -> None:
        """Record a tensor's dtype, its device and whether it trains."""
        self.tensors.append((tensor, tensor.dtype, tensor.device, tensor.requires_grad))

    def probability(self, owner: Any, name: str, mode: nn.Module) -> None:
        """Record a dropout. Its probability is read at each look: 0 if ``mode`` is not training."""
        self.probabilities.append((owner, name, mode))

    def __reduce__(self):
        return _nothing, ()  # a basis belongs to one object: a copy or a pickle decides again

    def look(self) -> list[float] | None:
        """The dropouts' probabilities now. None if a recorded value changed, or if the ops do not
        know a dropout."""
        if active.name != self.backend:
            return None
        for table, name, value in self.values:
            if table.get(name) is not value:
                return None
        for table, filled in self.filled:
            if bool(table) is not filled:
                return None
        for module, kind, forward in self.kinds:
            if type(module) is not kind or kind.forward is not forward:
                return None
        for tensor, dtype, device, trains in self.tensors:
            if (
                tensor.dtype is not dtype
                or tensor.device != device
                or tensor.requires_grad is not trains
            ):
                return None
        found = []
        for owner, name, mode in self.probabilities:
            p = (getattr(owner, name) or 0.0) if mode.training else 0.0
            if not isinstance(p, (int, float)) or not 0 <= p < 1:
                return None
            found.append(float(p))
        return found


class Held:
    """A decision with its basis."""

    def __init__(self, decision: Decision, basis: Basis):
        self.decision, self.basis = decision, basis

    def probabilities(self) -> list[float] | None:
        """As :meth:`Basis.look`, which a generate calls once."""
        kept = generation.kept
        if kept is None:
            return self.basis.look()
        if self not in kept:
            kept[self] = self.basis.look()
        return kept[self]

    def __reduce__(self):
        return _nothing, ()


def _nothing() -> None:
    return None


class DecidesOnce:
    """Mixin of a site. The site implements :meth:`decide` and :meth:`rests_on`, and calls
    :meth:`decided` in its forward."""

    _held: Held | None = None

    def decide(self) -> Decision:
        """Decide."""
        raise NotImplementedError

    def rests_on(self, basis: Basis) -> None:
        """Record in ``basis`` what :meth:`decide` reads, and the dropouts of each forward."""
        raise NotImplementedError

    def decision(self) -> Decision:
        """The current decision, for ``explain``."""
        held = self._held
        if held is None or held.basis.look() is None:
            held = self._decide_now()
        return held.decision

    def decided(self, x: Tensor) -> tuple[Decision, list[float] | None]:
        """The current decision and the probabilities of the dropouts. The probabilities are None if
        the public function has to check the arguments: the input differs from the one of the
        decision, autocast is on, or a graph is traced."""
        if torch.compiler.is_compiling():
            return self.decide(), None
        held = self._held
        probabilities = None if held is None else held.probabilities()
        if probabilities is None:
            held = self._decide_now()
            probabilities = held.basis.look()
        decision = held.decision
        if (
            decision.given is None
            or x.dtype is not decision.dtype
            or x.shape[-1] != decision.width
            or x.device != decision.device
            or torch.is_autocast_enabled(decision.device.type)
        ):
            return decision, None
        return decision, probabilities

    def _decide_now(self) -> Held:
        basis = Basis()
        self.rests_on(basis)
        held = Held(self.decide(), basis)
        # a dropout that the ops do not know is checked again in each forward
        self._held = None if basis.look() is None else held
        return held

    def decide_again(self) -> None:
        """Drop the decision: weights were moved."""
        self._held = None
