"""The updates of several methods' sites of one kind, each on its own rows of a batch."""

from collections.abc import Callable

from torch import Tensor, nn

from pelt_fast.ops.common import dispatch

from .adapter import Bottleneck
from .ffn import ParallelFFNAdapter
from .late import in_force
from .methods import NO_DROPOUT, Factors
from .routing import Routes, Routing

WIDENED_DRAWS = 3  # seeds that the widened block draws: its bottleneck's, and two of the block's
Sites = dict[int, nn.Module]  # by the ids of their methods
Layer = Callable[[Tensor], Tensor]


class RoutedUpdate:
    """Adds the updates of sites to a tensor: one grouped op for all methods of one activation. A
    site that the op does not cover runs by itself on its own rows."""

    def __init__(self, routing: Routing, routes: Routes):
        self.routing, self.routes = routing, routes

    def __call__(
        self, sites: Sites, base: Tensor | Layer, x: Tensor, sequential: bool = False
    ) -> Tensor:
        """base + Δ_g(x) in the rows of each method g.

        Args:
            sites: bottlenecks by method.
            base: a tensor whose rows are the batch's, or a function of x that gives one.
            x: what the bottlenecks read.
            sequential: whether x is ``base``, and a site may have no residual.
        """
        grouped: dict[str, Sites] = {}
        alone: Sites = {}
        for method, site in sites.items():
            why = _why_alone(site, sequential)
            if why is None:
                grouped.setdefault(site.activation, {})[method] = site
            else:
                dispatch.fall_back(f"routes: one method at a time, because {why}")
                alone[method] = site
        for activation, group in grouped.items():
            base = self._grouped(activation, group, base, x)
        base = base if isinstance(base, Tensor) else base(x)
        for method, site in alone.items():
            base = self._alone(method, site, base, x, sequential)
        return base

    def _grouped(self, activation: str, sites: Sites, base: Tensor | Layer, x: Tensor) -> Tensor:
        factors = Factors(self.routing.count)
        for method, site in sites.items():
            down, up = (site.down_weight, site.down_bias), (site.up_weight, site.up_bias)
            factors.add(method, down, up, site.scale, in_force(site.dropout))
        draws = max(draws_of(site) for site in sites.values())
        drop = factors.dropout(self.routing, x.device, draws)
        x = x.to(base.dtype) if isinstance(base, Tensor) else x
        return factors.update(
            self.routes, x, base, activation, input_drop=NO_DROPOUT, hidden_drop=drop
        )

    def _alone(
        self, method: int, site: Bottleneck, base: Tensor, x: Tensor, sequential: bool
    ) -> Tensor:
        def compute(rows: Tensor | slice) -> Tensor:
            with self.routing.seeds_of(method, draws_of(site)):
                if sequential:
                    return site.sequential(x[rows])
                return site.parallel(base[rows], x[rows])

        return self.routes.put(method, base, compute)

    def of_heads(self, sites: Sites, base: Tensor, x: Tensor) -> Tensor:
        """base + Δ_g(x) by head, in the rows of each method g."""
        y = base
        for method, site in sites.items():

            def compute(rows: Tensor | slice, method=method, site=site) -> Tensor:
                with self.routing.seeds_of(method):
                    return base[rows] + site.update(x[rows])

            y = self.routes.put(method, y, compute)
        return y


def draws_of(site: nn.Module) -> int:
    """How many seeds the op of a site alone draws."""
    return WIDENED_DRAWS if isinstance(site, ParallelFFNAdapter) else 1


def _why_alone(site: Bottleneck, sequential: bool) -> str | None:
    """Why the grouped op does not take a site, or None."""
    if site.norm is not None:
        return "an adapter has a LayerNorm of its own"
    if not isinstance(site.scale, (int, float)):
        return "an adapter's scale is learned"
    if sequential and not site.residual:
        return "an adapter has no residual"
    return None
