"""What is known about an injected model: its config, its sites, and the changes made to it."""

from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.layouts.layout import Layout
from pelt_fast.modules.switch import Switch

from .conditions import Conditions
from .handles import carrier_of
from .undo_log import UndoLog
from .values_before import ValuesBefore


class Site:
    """One modified module: its name in the model, the op it runs, and the module that runs it."""

    def __init__(self, name: str, op: str, form: str, module: nn.Module, **details):
        self.name, self.op, self.form, self.module = name, op, form, module
        self.details = details


class Injection:
    """The record of one injected method. It is ``model._pelt``, copied and pickled with the model.

    ``sites`` are in the order in which they were built. ``changes`` takes everything back.
    """

    together = False  # whether several methods are in the model (inject_together)

    def __init__(self, config: PeltConfig, pack: bool = True):
        self.config, self.pack = config, pack
        self.layout: Layout | None = None  # where it is not a row of the table
        self.discovered = False  # whether that layout was found on the model itself
        self.sites: list[Site] = []
        self.blocks: dict = {}  # the feed-forward blocks that sites run, by layer and entry
        self.head: list[str] = []  # names of the task head's parameters
        self.biases: list[str] = []  # names of the base's biases that the method trains
        self.trainable_before: dict[str, bool] = {}  # requires_grad, by parameter name
        self.merged: list[str] = []  # names of the sites that are folded into the base
        self.before = ValuesBefore()
        self.configs: list = []  # the copies of the model's configs (own_configs)
        self.changes = UndoLog()
        self.switch = Switch()  # read by each site
        self._conditions: list[tuple[nn.Module, Conditions]] = []

    @property
    def own_trained(self) -> set[str]:
        """Names of the model's own parameters that train."""
        return {*self.head, *self.biases}

    def conditions_of(self, stack: nn.Module) -> Conditions:
        """The conditions before each forward of ``stack``; registered at the first call."""
        for known, conditions in self._conditions:
            if known is stack:
                return conditions
        conditions = Conditions()
        self.changes.hook(stack.register_forward_pre_hook(conditions))
        self._conditions.append((stack, conditions))
        return conditions


def injection_of(model: nn.Module) -> Injection:
    """The injection of the model that carries the method of ``model`` (``handles.carrier_of``)."""
    return carrier_of(model)._pelt


def refuse_together(injection: Injection, call: str) -> None:
    """ValueError for a call that is for one method, where several are in the model."""
    if injection.together:
        raise ValueError(
            f"{call} is for one method, and several are in this model together: write the one that"
            " is wanted with save(model, folder, method=name), and load it alone"
        )
