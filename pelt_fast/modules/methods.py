"""The sites of several methods at one module of the model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
)
from pelt_fast.ops.common.dropout import drops
from pelt_fast.ops.routed.op import routed_update

from .frozen_module import FrozenModule
from .joined_projection import JoinedProjection
from .late import in_force
from .lora import LoRALinear
from .routing import Routes, Routing
from .switch import Switch


class Methods(nn.Module):
    """The sites of several methods under one name of one module: a child for each method."""

    def __init__(self, routing: Routing, switch: Switch):
        super().__init__()
        self.routing, self.switch = routing, switch

    def put(self, method: str, site: nn.Module) -> None:
        """Register the site of a method."""
        self.add_module(method, site)

    def of(self, method: int) -> nn.Module | None:
        """The site of a method, by its id."""
        return self.sites.get(method)

    def acting(self, routes: Routes) -> list[tuple[int, nn.Module]]:
        """The sites of the methods that rows may be under, in the order of their ids."""
        sites = sorted(self.sites.items())
        return [(method, site) for method, site in sites if self.routing.may_act(method, routes)]

    @property
    def sites(self) -> dict[int, nn.Module]:
        """The sites by the ids of their methods."""
        ids = self.routing.ids
        return {ids[name]: site for name, site in list(self._modules.items()) if name in ids}


class Factors:
    """The low-rank factors of several methods, as the routed op takes them: in the order of the
    methods' ids, with a rank of 0 for a method that has nothing here."""

    def __init__(self, count: int):
        self.ranks, self.scales, self.probabilities = [0] * count, [1.0] * count, [0.0] * count
        self.down_weights: list[Tensor] = []
        self.down_biases: list[Tensor] = []
        self.up_weights: list[Tensor] = []
        self.up_biases: list[Tensor | None] = [None] * count

    def add(
        self,
        method: int,
        down: tuple[Tensor, Tensor | None],
        up: tuple[Tensor, Tensor | None],
        scale: float,
        p: float,
    ) -> None:
        """Add the factors of a method; methods are added in the order of their ids."""
        self.ranks[method] = down[0].shape[0]
        self.scales[method], self.probabilities[method] = float(scale), p
        self.down_weights.append(down[0])
        self.up_weights.append(up[0].reshape(-1))
        if down[1] is not None:
            self.down_biases.append(down[1])
        self.up_biases[method] = up[1]

    @property
    def down(self) -> RoutedDown:
        """The first halves."""
        biases = torch.cat(self.down_biases) if self.down_biases else None
        return RoutedDown(torch.cat(self.down_weights), biases)

    @property
    def up(self) -> RoutedUp:
        """The second halves."""
        like = next((bias for bias in self.up_biases if bias is not None), None)
        if like is None:
            return RoutedUp(torch.cat(self.up_weights), None)
        biases = [torch.zeros_like(like) if bias is None else bias for bias in self.up_biases]
        return RoutedUp(torch.cat(self.up_weights), torch.stack(biases))

    def dropout(self, routing: Routing, device: torch.device, draws: int = 1) -> RoutedDropout:
        """The dropout of each method; the seeds are drawn here. The op of a method alone draws
        ``draws`` of them, and uses the first."""
        if not any(drops(p) for p in self.probabilities):
            return RoutedDropout([], None)
        seeds = routing.draw_seeds(self.probabilities, device, draws)
        return RoutedDropout(self.probabilities, seeds)

    def update(
        self,
        routes: Routes,
        x: Tensor,
        layer: Callable[[Tensor], Tensor] | Tensor,
        activation: str,
        *,
        input_drop: RoutedDropout,
        hidden_drop: RoutedDropout,
    ) -> Tensor:
        """The updates of all methods around ``layer`` on x (..., K)."""
        if x.dim() > 2 and routes.lengths is None:
            routes.check(x.shape[0])
        where = routes.segments(x.numel() // x.shape[-1], self.ranks, x.device)
        transform = RoutedTransform(activation, self.scales)
        return routed_update(
            x, layer, self.down, self.up, where, transform, input_drop, hidden_drop
        )


NO_DROPOUT = RoutedDropout([], None)


class RoutedLoRA(Methods):
    """LoRA of several methods on one linear layer: one product of the frozen matrix for all rows,
    and a grouped update."""

    def __init__(self, routing: Routing, switch: Switch, linear: nn.Module):
        super().__init__(routing, switch)
        self.frozen = FrozenModule(linear)

    def forward(self, x: Tensor) -> Tensor:
        routes = self.routing.now()
        if self.switch.any_block and self.switch.is_off():
            return self.frozen.bare(x)
        if routes.alone is not None:
            site = self.of(routes.alone)
            with self.routing.seeds_of(routes.alone):
                return self.frozen.bare(x) if site is None else site(x)
        acting, factors = self.acting(routes), Factors(self.routing.count)
        if not acting:
            return self.frozen.bare(x)
        for method, site in acting:
            lora_a, lora_b, scale, p = _low_rank(site)
            factors.add(method, (lora_a, None), (lora_b, None), scale, p)
        drop = factors.dropout(self.routing, x.device)
        return factors.update(
            routes, x, self.frozen.bare, "identity", input_drop=drop, hidden_drop=NO_DROPOUT
        )


def _low_rank(site: LoRALinear | JoinedProjection) -> tuple[Tensor, Tensor, float, float]:
    """lora_a (R, K), lora_b (N, R), the scale and the probability of a site."""
    if isinstance(site, JoinedProjection):
        return site.low_rank()
    return site.lora_a, site.lora_b, site.scale, in_force(site.dropout)
