"""Parameters that a merge wrote: how one is written, and how all are written back."""

from torch import Tensor, nn

from pelt_fast.modules.hooked import is_away
from pelt_fast.modules.projection_view import ProjectionView

from .record import Injection

# module, parameter name, and the value before (None: no parameter)
Overwritten = tuple[nn.Module, str, Tensor | None]


def set_parameter(linear: nn.Module, name: str, value: Tensor | None) -> Overwritten:
    """Give a linear layer's parameter another value, and return what restores the old one."""
    if isinstance(linear, ProjectionView):
        return linear, name, linear.write(name, value)
    parameter = getattr(linear, name)
    before = (linear, name, None if parameter is None else parameter.data)
    if value is None or parameter is None:
        grad = linear.weight.requires_grad
        parameter = None if value is None else nn.Parameter(value, requires_grad=grad)
        linear.register_parameter(name, parameter)
    else:
        parameter.data = value
    if name == "weight":
        linear.out_features, linear.in_features = value.shape
    return before


def set_back(before: list[Overwritten]) -> None:
    """Write the old values back, the last one first."""
    for module, name, value in reversed(before):
        set_parameter(module, name, value)


def unfold(injection: Injection) -> None:
    """Undo a merge: the base has its weights again, bit for bit, and every site runs again.

    Raises ValueError, before anything is changed, when no copy of the base was kept, or when the
    weights were offloaded since.
    """
    overwritten = injection.before.overwritten
    if not overwritten:
        raise ValueError("it was merged with keep_base=False: no copy of the base is left")
    if any(is_away(module) for module, *_ in overwritten):
        raise ValueError(
            "this model is merged, and its weights were offloaded since: accelerate.hooks."
            "remove_hook_from_submodules(model) first, then unmerge or eject"
        )
    set_back(overwritten)
    for site in injection.sites:
        if site.name in injection.merged:
            site.module.merged = False
    injection.merged, injection.before.overwritten = [], []
