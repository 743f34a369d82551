"""The prefixes of several methods on one attention module."""

from torch import Tensor

from .prefix_run import AttentionSlice
from .routing import Routes, Routing
from .switch import Switch


class RoutedSlice:
    """What the attention function finds on a module on which several methods have a prefix, or
    bottlenecks that read the query."""

    def __init__(self, routing: Routing, switch: Switch):
        self.routing, self.switch = routing, switch
        self.slices: dict[int, AttentionSlice] = {}

    def put(self, method: int, one: AttentionSlice) -> None:
        """Add the slice of a method."""
        self.slices[method] = one

    def drop(self, method: int) -> None:
        """Forget a method."""
        self.slices.pop(method, None)

    def now(self) -> "AttentionSlice | RoutedSlice | None":
        """What acts in this forward: the slice of the one method of all rows, this object if there
        are several, or None."""
        if self.switch.any_block and self.switch.is_off():
            return None
        routes = self.routes
        if routes.alone is not None:
            return self.slices.get(routes.alone)
        return self if any(self.routing.may_act(method, routes) for method in self.slices) else None

    @property
    def routes(self) -> Routes:
        """The routes in force."""
        return self.routing.now()

    def by_form(self) -> dict[tuple[str, str], dict[int, AttentionSlice]]:
        """The slices by form and composition, each by its method."""
        found: dict[tuple[str, str], dict[int, AttentionSlice]] = {}
        routes = self.routes
        for method, one in sorted(self.slices.items()):
            if not self.routing.may_act(method, routes):
                continue
            found.setdefault((one.form, one.composition), {})[method] = one
        return found

    def stacked(
        self, slices: dict[int, AttentionSlice], scaling: float, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values of each method on the device of ``like``, of length 0 for a method
        that has none among ``slices``."""
        made = {method: [t.to(like.device) for t in one(scaling)] for method, one in slices.items()}
        empty = [next(iter(made.values()))[0][:, :0]] * 2
        each = [made.get(method, empty) for method in range(self.routing.count)]
        return [keys for keys, _ in each], [values for _, values in each]
