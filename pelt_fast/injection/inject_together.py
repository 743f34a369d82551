"""inject_together: several methods at once in one model, for :func:`pelt_fast.route`."""

from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules.class_counts import ClassCounts
from pelt_fast.modules.decision import DecidesOnce
from pelt_fast.modules.kept_input import KeptInput
from pelt_fast.modules.routing import MethodSwitch, Routing

from .build import BUILDERS
from .checks import check
from .class_layer import check_num_labels
from .described import described
from .generate import take_generate
from .handles import mark
from .inject import _restore
from .own_configs import own_configs
from .own_parameters import add_own_parameters
from .prove_added import prove_added
from .record import Injection
from .repacking import keep_gradients
from .routed_log import RoutedLog
from .watch import watch

_WATCH = ":watch"  # the name under which the hooks that watch the model are recorded


class TogetherInjection(Injection):
    """The record of several methods in one model."""

    together = True

    def __init__(self, layout: Layout | None):
        super().__init__(PeltConfig("several methods"), pack=False)
        self.routing, self.given_layout = Routing(), layout
        self.changes = RoutedLog(self.routing, self.switch)
        self.methods: dict[str, PeltConfig] = {}
        self.own: dict[str, list[str]] = {}  # task heads and biases, by method
        self.owners: list[nn.Module] = []  # of the stacks that the methods are on

    @property
    def active(self) -> str | None:
        """The name of the method that acts on all rows where no route says otherwise; None if the
        base alone does."""
        number = self.routing.default.single
        names = (name for name, known in self.routing.ids.items() if known == number)
        return next(names, None)

    def known(self, name: str) -> str:
        """``name``; ValueError if no method has it."""
        if name not in self.methods:
            raise ValueError(f"no method is named {name!r}; there are {', '.join(self.methods)}")
        return name


def inject_together(
    model: nn.Module,
    methods: dict[str, PeltConfig],
    layout: Layout | None,
    num_labels: dict[str, int],
) -> TogetherInjection:
    """Put methods into a model, each beside the others. The base is frozen, and the first method
    acts on all rows until :func:`pelt_fast.route` says otherwise. ``num_labels``: of the methods
    that have another number of classes than the model."""
    injection = TogetherInjection(layout)
    try:
        own_configs(model, injection)
        keep_gradients(model, injection.changes)
        _freeze(model, injection)
        begin = model.register_forward_pre_hook(injection.routing.begin, with_kwargs=True)
        injection.changes.hook(begin)
        _count_classes(model, injection)
        end = model.register_forward_hook(injection.routing.end, always_call=True)
        injection.changes.hook(end)
        take_generate(model, injection)
        for name, config in methods.items():
            build_method(model, name, config, injection, num_labels.get(name))
        settle(model, injection)
    except BaseException:
        injection.changes.method = None
        _restore(model, injection)
        raise
    model._pelt = injection
    return injection


def settle(model: nn.Module, injection: TogetherInjection) -> None:
    """The methods in the model are others now: mark its parts, watch it, and let every site decide
    again."""
    for handle in injection.changes.hooks.pop(_WATCH, []):
        handle.remove()
    mark(model, [base_of(model), *injection.owners], injection)
    injection.changes.method = _WATCH
    try:
        watch(model, injection.owners, injection)
    finally:
        injection.changes.method = None
    for site in injection.sites:
        if isinstance(site.module, DecidesOnce):
            site.module.decide_again()
            site.module.decision()


def remove_method(model: nn.Module, name: str, injection: TogetherInjection) -> None:
    """Take one method out; the others stay as they are."""
    _forget(name, injection)
    injection.sites = [s for s in injection.sites if s.details.get("method") != name]
    settle(model, injection)


def _forget(name: str, injection: TogetherInjection) -> None:
    """Undo the changes of one method, and forget what is known by its name."""
    injection.changes.drop(name)
    number = injection.routing.ids.pop(name)
    injection.routing.generators.pop(number, None)
    injection.classes.by_method.pop(number, None)
    injection.methods.pop(name, None)
    injection.own.pop(name, None)


def _count_classes(model: nn.Module, injection: TogetherInjection) -> None:
    """Let the model return what its methods' numbers of classes ask for."""
    usual = getattr(getattr(model, "config", None), "num_labels", None)
    classes = ClassCounts(injection.routing, injection.switch, usual)
    injection.classes = classes
    before = model.register_forward_pre_hook(classes.refuse_labels, with_kwargs=True)
    injection.changes.hook(before)
    injection.changes.hook(model.register_forward_hook(classes.split))


def build_method(
    model: nn.Module,
    name: str,
    config: PeltConfig,
    injection: TogetherInjection,
    num_labels: int | None = None,
) -> None:
    """Build the sites of one more method. If that fails, it leaves nothing behind."""
    if num_labels is not None:
        check_num_labels(model, name, config, num_labels)
    first = len(injection.sites)
    try:
        _build(model, name, config, injection, num_labels)
        if num_labels is not None:
            injection.classes.by_method[injection.routing.ids[name]] = num_labels
    except BaseException:
        _forget(name, injection)
        del injection.sites[first:]
        raise


def _build(
    model: nn.Module,
    name: str,
    config: PeltConfig,
    injection: TogetherInjection,
    num_labels: int | None,
) -> None:
    injection.routing.id_of(name)
    injection.config, injection.changes.method = config, name
    first = len(injection.sites)
    try:
        stacks = described(model, injection.given_layout, injection)
        check(model, config, stacks)
        injection.methods[name] = config
        injection.own[name] = add_own_parameters(model, config, stacks, injection, num_labels)
        for form, build in BUILDERS.items():
            for modification in config.modifications:
                if modification.form == form:
                    build(model, modification, stacks, injection)
        base = base_of(model)
        owners = [find(base, stack.owner) for stack in stacks]
        injection.owners = list(dict.fromkeys([*injection.owners, *owners]))
        _connect(name, injection, first)
        if injection.layout is not None and stacks:
            sites, number = injection.sites[first:], injection.routing.ids[name]
            found = injection.discovered
            prove_added(model, stacks, sites, injection.routing, number, found)
    finally:
        injection.config, injection.changes.method = PeltConfig("several methods"), None


def _freeze(model: nn.Module, injection: Injection) -> None:
    for name, parameter in parameters_of(model).items():
        injection.trainable_before[name] = parameter.requires_grad
        parameter.requires_grad_(False)


def _connect(name: str, injection: TogetherInjection, first: int) -> None:
    """Give the new sites their switch: they are off where no row can be under their method."""
    switch = MethodSwitch(injection.switch, injection.routing, injection.routing.ids[name])
    for site in injection.sites[first:]:
        site.details["method"] = name
        site.module.switch = switch
        kept = getattr(site.module, "kept_input", None)
        if isinstance(kept, KeptInput):
            kept.switch = switch
