"""Activation and dropouts, which a site reads in each forward, as the layer's own code does."""

from torch import Tensor, nn
from torch.nn import functional as F

from .decision import Basis
from .frozen_module import FrozenModule, foreign_forward, is_hooked, passthrough
from .hooked import give_back, put, wrappers


def in_force(dropout: nn.Dropout) -> float:
    """The probability of a method's own dropout now."""
    return dropout.p if dropout.training else 0.0


class Attribute:
    """``owner.name``, read at each use; None if it does not exist."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name

    @property
    def value(self):
        """The value now."""
        return getattr(self.owner, self.name, None)

    def rests_on(self, basis: Basis) -> None:
        """Record in ``basis`` where the value is, and what can change about it."""
        basis.attribute(self.owner, self.name)
        if isinstance(self.value, nn.Module):
            basis.module(self.value, "approximate", "act")

    @property
    def source(self) -> tuple[object, str]:
        """The object and its attribute that hold the value."""
        return self.owner, self.name

    def run(self, x: Tensor) -> Tensor:
        """Apply the value now."""
        return self.value(x)


class Taken(Attribute):
    """An attribute of a layer whose work a site does. The layer finds a value that does nothing.
    The site keeps the value that was there, and takes any value that is written there later.

    False replaces a probability: it drops nothing, and nobody else writes it. ``passthrough``
    replaces a function or a module's forward.
    """

    def __init__(self, owner: nn.Module, name: str):
        super().__init__(owner, name)
        self._value, self._frozen, self._before = None, None, None
        self.take()

    @property
    def value(self):
        """The value that the layer would find without the site."""
        return self._value

    def is_taken_on(self, basis: Basis) -> None:
        """Record in ``basis`` what :meth:`take` reads: the value that the layer finds."""
        basis.attribute(self.owner, self.name)
        if isinstance(self._value, nn.Module):
            for name in ("forward", "_old_forward"):
                basis.value(self._value.__dict__, name)

    def rests_on(self, basis: Basis) -> None:
        if isinstance(self._value, (int, float)):
            return  # a probability is read in each forward
        basis.value(self.__dict__, "_value")
        if isinstance(self._value, nn.Module):
            basis.module(self._value, "approximate", "act")

    @property
    def source(self) -> tuple[object, str]:
        return self, "_value"

    def take(self) -> bool:
        """Take over the value, unless it is taken already. Return whether it was taken now."""
        found = getattr(self.owner, self.name, None)
        if found is None or found is False or found is passthrough:
            return False
        if isinstance(found, nn.Module):
            if found is self._value and any(f is passthrough for f in wrappers(found)):
                return False
            self._release()
            self._frozen = FrozenModule(found)
            self._before = put(found, passthrough)
        else:
            self._release()
            setattr(self.owner, self.name, passthrough if callable(found) else False)
        self._value = found
        return True

    def give_back(self) -> None:
        """Give the layer its current value back."""
        found = getattr(self.owner, self.name, None)
        if self._frozen is None and (found is False or found is passthrough):
            setattr(self.owner, self.name, self._value)
        self._release()

    def _release(self) -> None:
        """Give a taken module its own forward back."""
        frozen, self._frozen = self._frozen, None
        if frozen is not None:
            give_back(frozen.module, self._before, passthrough)

    def run(self, x: Tensor) -> Tensor:
        """Apply the value that the layer had."""
        return self._value(x) if self._frozen is None else self._frozen.bare(x)


class _Never:
    """Replaces a dropout that does not exist."""

    p, training = 0.0, False


class Dropout:
    """A dropout of the model: a module, which has its own mode, or a probability, which has the
    mode of its owner. None means no dropout."""

    def __init__(self, at: Attribute | None = None):
        self.at = at

    @property
    def p(self) -> float | None:
        """The probability in training; None for an unknown module."""
        value = None if self.at is None else self.at.value
        if value is None or type(value) is nn.Identity:
            return 0.0
        if not isinstance(value, nn.Module):
            return float(value)
        ours = type(value) is nn.Dropout and foreign_forward(value) is None
        return value.p if ours and not is_hooked(value) else None

    def rests_on(self, basis: Basis) -> None:
        """Record in ``basis`` the dropout and where its probability is read."""
        value = None if self.at is None else self.at.value
        if value is None or type(value) is nn.Identity:
            basis.probability(_Never, "p", _Never)
        elif isinstance(value, nn.Module):
            basis.probability(value, "p", value)
        else:
            basis.probability(*self.at.source, self.at.owner)
        if self.at is not None and not isinstance(value, (int, float)):
            self.at.rests_on(basis)

    @property
    def now(self) -> float | None:
        """The probability now: 0 outside training."""
        if self.at is None:
            return 0.0
        value, p = self.at.value, self.p
        mode = value if isinstance(value, nn.Module) else self.at.owner
        return p if mode.training or p is None else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.at is None:
            return x
        if callable(self.at.value):
            return self.at.run(x)
        return F.dropout(x, float(self.at.value or 0.0), self.at.owner.training)
