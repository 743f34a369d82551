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
        return self if routes.single is None else self.slices.get(routes.single)

    @property
    def routes(self) -> Routes:
        """The routes in force."""
        return self.routing.now()

    def by_form(self) -> dict[tuple[str, str], dict[int, AttentionSlice]]:
        """The slices by form and composition, each by its method."""
        found: dict[tuple[str, str], dict[int, AttentionSlice]] = {}
        for method, one in sorted(self.slices.items()):
            found.setdefault((one.form, one.composition), {})[method] = one
        return found

    def stacked(
        self, slices: dict[int, AttentionSlice], scaling: float, like: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """The keys and values of ``slices`` on the device of ``like``, and the length of each
        method's, 0 for a method that has none here."""
        keys, values, lengths = [], [], [0] * self.routing.count
        for method, one in slices.items():
            prefix_k, prefix_v = (t.to(like.device) for t in one(scaling))
            keys.append(prefix_k)
            values.append(prefix_v)
            lengths[method] = prefix_k.shape[1]
        return keys, values, lengths
